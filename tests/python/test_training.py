"""A training step: forward, and the gradients of tokens and weights through the same routing, replayed."""

import a2a
import numpy as np
import pytest

import ranks

COUNTS = [9, 0, 14]
REUSE = a2a.DispatchFlag.REUSE


def run_rank(rank, group, backend, layout):
    """Experts y = (e + 1) x + e, the loss sum(g * out): what every gradient must be is known."""
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    random = np.random.default_rng(rank)
    g = random.standard_normal(x.shape).astype(np.float32)
    other_weights = random.random(weights.shape, np.float32)
    dx_wanted, dw_wanted = np.zeros(x.shape), np.zeros(weights.shape, np.float64)
    for k in range(ranks.TOPK):
        chosen, number = ids[:, k] >= 0, ids[:, k, None].astype(np.float64)
        dx_wanted[chosen] += (weights[:, k, None] * (number + 1) * g)[chosen]
        dw_wanted[chosen, k] = (g * ((number + 1) * x + number)).sum(axis=1)[chosen]

    with ranks.Rank(rank, group, backend, layout, COUNTS) as me:
        # Forward. What the experts saw is kept for the way back: views end with combine.
        got = me.dispatch(x, ids, weights)
        kept = got.tokens.copy()
        results = me.compute(got, got.tokens)
        out = me.combine(got, results, len(x))
        assert out.tobytes() == ranks.alone(x, ids, weights, len(COUNTS), layout).tobytes()

        # Backward. The gradient of combine is a dispatch, that of dispatch a combine: the rows go where they went, with
        # the weights that they had, and each row's gradients of the weights ride along.
        got = me.dispatch(g, flags=REUSE)
        if ranks.is_by_expert(layout):
            rows, row_weights = np.full(kept.shape, np.nan, np.float32), np.full(len(kept), np.nan, np.float32)
            for number, span in me.experts_of(got):
                rows[span] = np.float32(number + 1) * got.tokens[span]
                row_weights[span] = (got.tokens[span] * ranks.expert(number, kept[span])).sum(axis=1)
        else:
            rows, row_weights = np.zeros_like(kept), np.full(got.topk_ids.shape, np.nan, np.float32)
            for row, k in np.ndindex(*got.topk_ids.shape):
                number = got.topk_ids[row, k]
                if me.mine(number):
                    rows[row] += got.topk_weights[row, k] * np.float32(number + 1) * got.tokens[row]
                    row_weights[row, k] = (got.tokens[row] * ranks.expert(number, kept[row])).sum()
        dw = np.full(weights.shape, np.nan, np.float32)
        dx = me.combine(got, rows, len(x), row_weights, dw)
        assert np.allclose(dx, dx_wanted, rtol=1e-5, atol=1e-5)
        assert np.allclose(dw, dw_wanted, rtol=1e-5, atol=1e-4)
        assert (dw[ids < 0] == 0).all()

        # Forward again with other weights. The loss is linear in them, so its change is what the gradient says.
        got = me.dispatch(x, weights=other_weights, flags=REUSE)
        other = me.combine(got, me.compute(got, got.tokens), len(x))
        assert other.tobytes() == ranks.alone(x, ids, other_weights, len(COUNTS), layout).tobytes()
        change = (g * (other.astype(np.float64) - out)).sum()
        assert np.isclose(change, (dw * (other_weights.astype(np.float64) - weights)).sum(), rtol=1e-4, atol=1e-2)

        # And with one weight changed at a time, on one token of each rank: a finite difference for each element.
        for k in range(ranks.TOPK):
            moved = weights.copy()
            moved[:1, k] += 1
            got = me.dispatch(x, weights=moved, flags=REUSE)
            other = me.combine(got, me.compute(got, got.tokens), len(x))
            difference = (g * (other.astype(np.float64) - out)).sum(axis=1)
            assert np.allclose(difference[:1], dw[:1, k], rtol=1e-3, atol=1e-3)
            assert (difference[1:] == 0).all()


@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
def test_training_step(threads, backend, layout):
    ranks.together(threads, len(COUNTS), run_rank, backend, layout)


def run_with_new_tokens(rank, group, backend, layout):
    """A replay may carry other rows: here of another type and another width, twice."""
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    with ranks.Rank(rank, group, backend, layout, COUNTS) as me:
        with pytest.raises(a2a.InvalidArgumentError, match="routing"):
            me.dispatch(x, flags=REUSE)
        me.combine(got := me.dispatch(x, ids, weights), me.compute(got, got.tokens), len(x))
        for hidden in (16, 32):
            narrow = x[:, :hidden].astype(np.float16)
            got = me.dispatch(narrow, flags=REUSE)
            y = me.combine(got, me.compute(got, got.tokens), len(x))
            assert y.tobytes() == ranks.alone(narrow, ids, weights, len(COUNTS), layout).tobytes()
        for wrong, word in [(dict(ids=ids), "topk_ids"), (dict(x=np.zeros((len(x) + 1, 48), np.float32)), "tokens")]:
            with pytest.raises(a2a.InvalidArgumentError, match=word):
                me.dispatch(**(dict(x=x, flags=REUSE) | wrong))


@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
def test_a_replay_may_carry_other_rows(threads, backend, layout):
    ranks.together(threads, len(COUNTS), run_with_new_tokens, backend, layout)
