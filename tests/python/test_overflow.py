"""More rows than max_recv_rows: dropped and counted, or a step that nobody receives."""

import a2a
import numpy as np
import pytest

import ranks

COUNTS = [17, 0, 33]
PAIRS = [pair for pair in ranks.PAIRS if pair[1] not in ("gathered", "rank_major")]
UNLIMITED = [pair for pair in ranks.PAIRS if pair not in PAIRS]


def arriving(rank, layout):
    """What comes to a rank before anything is dropped: (row, source, token, its experts here), by row, where a row of
    EXPERT_PADDED counts from its expert's first; and how many rows that takes."""
    mine = [e for e in range(ranks.EXPERTS) if ranks.owner_of(e, len(COUNTS)) == rank]
    tokens = [(source, token, ids) for source in range(len(COUNTS))
              for token, ids in enumerate(ranks.tokens_of(source, COUNTS[source], "float32")[1])]
    chosen = lambda ids, experts: [e for e in experts if e in ids]
    if layout == "flat":
        rows = [(s, t, chosen(ids, mine)) for s, t, ids in tokens if chosen(ids, mine)]
        return [(row, *rest) for row, rest in enumerate(rows)], len(rows)
    rows, start, most = [], 0, 0
    for e in mine:
        of_expert = [(s, t, [e]) for s, t, ids in tokens if e in ids]
        rows += [(start + i, *rest) for i, rest in enumerate(of_expert)]
        most = max(most, len(of_expert))
        if layout == "expert_contiguous":
            start += -(-len(of_expert) // ranks.ALIGNMENT) * ranks.ALIGNMENT
    return rows, start if layout == "expert_contiguous" else most


def run_drop(rank, group, backend, layout, limit):
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    rows, demand = arriving(rank, layout)
    kept = [entry for entry in rows if entry[0] < limit]
    # The pairs that reached their rank, of this rank's tokens.
    reached = {(t, e) for r in range(len(COUNTS)) for row, s, t, experts in arriving(r, layout)[0] for e in experts
               if row < limit and s == rank}
    with ranks.Rank(rank, group, backend, layout, COUNTS, max_recv_rows=limit, overflow="drop") as me:
        local = me.info.num_local_experts
        assert me.info.row_capacity == limit * (local if layout == "expert_padded" else 1)
        for flags in (0, a2a.DispatchFlag.REUSE):  # drops stay
            got = me.dispatch(x, *(() if flags else (ids, weights)), flags=flags)
            valid = got.row_source[:, 0] >= 0
            assert got.row_source[valid].tolist() == [[s, t] for _, s, t, _ in kept]
            assert got.rank_counts.tolist() == [sum(s == r for _, s, _, _ in kept) for r in range(len(COUNTS))]
            first = me.info.first_expert
            counts = [sum(e in experts for _, _, _, experts in kept) for e in range(first, first + local)]
            assert got.expert_counts.tolist() == counts
            dropped = len(rows) - len(kept)
            assert got.status[:4].tolist() == [a2a.StepFlag.DROPPED if dropped else 0, 0, dropped, demand]
            status = np.full(4 + len(COUNTS), 77, np.int32)
            y = me.combine(got, me.compute(got, got.tokens), len(x), status=status)
            wanted = ranks.alone(x, ids, weights, len(COUNTS), layout, lambda t, e: (t, e) in reached)
            assert y.tobytes() == wanted.tobytes()
            key = (lambda e: e) if ranks.is_by_expert(layout) else (lambda e: ranks.owner_of(e, len(COUNTS)))
            due = {(t, key(e)) for t, row in enumerate(ids) for e in row if e >= 0}
            missing = len(due) - len({(t, key(e)) for t, e in reached})
            assert status.tolist() == [a2a.StepFlag.DROPPED if missing else 0, 0, missing] + [0] * (1 + len(COUNTS))


@pytest.mark.parametrize("limit", [1, 10, 16])
@pytest.mark.parametrize("backend, layout", PAIRS)
def test_drop(threads, backend, layout, limit):
    assert all(arriving(rank, layout)[1] > limit for rank in range(len(COUNTS)))
    ranks.together(threads, len(COUNTS), run_drop, backend, layout, limit)


def run_error(rank, group, backend, layout, limit):
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    demands = [arriving(r, layout)[1] for r in range(len(COUNTS))]
    over = [int(demand > limit) for demand in demands]
    first = over.index(1)
    few = ids.copy()
    few[4:] = -1  # fits
    with ranks.Rank(rank, group, backend, layout, COUNTS, max_recv_rows=limit) as me:
        for _ in range(2):
            status = np.full(4 + len(COUNTS), 77, np.int32)
            with pytest.raises(a2a.OverflowError, match="max_recv_rows") as refusal:
                me.dispatch(x, ids, weights, status=status)
            assert refusal.value.ranks == tuple(np.flatnonzero(over))
            assert f"rank {first}" in str(refusal.value) and str(demands[first]) in str(refusal.value)
            assert status[[0, 3]].tolist() == [a2a.StepFlag.VOID | a2a.StepFlag.OVERFLOW, demands[rank]]
            assert status[4:].tolist() == over
            for call in (lambda: me.dispatch(x, flags=a2a.DispatchFlag.REUSE), lambda: me.comm.combine(me.routing, x, x)):
                with pytest.raises(a2a.InvalidArgumentError):
                    call()
            got = me.dispatch(x, few, weights)
            y = me.combine(got, me.compute(got, got.tokens), len(x))
            assert y.tobytes() == ranks.alone(x, few, weights, len(COUNTS), layout).tobytes()


@pytest.mark.parametrize("backend, layout", PAIRS)
def test_error(threads, backend, layout):
    # Exactly what one rank needs, and less than another does.
    demands = [arriving(rank, layout)[1] for rank in range(len(COUNTS))]
    limit = min(demands)
    assert limit < max(demands)
    ranks.together(threads, len(COUNTS), run_error, backend, layout, limit)


@pytest.mark.parametrize("backend, layout", UNLIMITED)
def test_layouts_with_fixed_places_refuse_a_limit(backend, layout):
    with pytest.raises(a2a.UnsupportedError, match="max_recv_rows"):
        a2a.query_memory(ranks.config_of(0, 1, bytes(128), backend, 8, "float32", max_recv_rows=4))
