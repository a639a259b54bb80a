"""a2a_get_history gives JSON that tells a rank's last operations: how they ended, and that one is in flight."""

import threading
import time

import a2a
import pytest

import ranks

COUNTS = [5, 3]


def steps(rank, group, count):
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    with ranks.Rank(rank, group, "flashinfer_nvlink_one_sided", "rank_major", COUNTS, "float32") as me:
        for _ in range(count):
            got = me.dispatch(x, ids, weights)
            me.combine(got, me.compute(got, got.tokens), len(x))
        return me.comm.history()


def test_the_operations_of_three_steps(threads):
    for rank, told in enumerate(ranks.together(threads, 2, steps, 3)):
        assert (told["rank"], told["num_ranks"], told["async_error"]) == (rank, 2, None)
        assert told["version"] == a2a.version()
        operations = told["operations"]
        assert [entry["number"] for entry in operations] == [1, 2, 3, 4, 5, 6]
        assert [entry["operation"] for entry in operations] == ["dispatch", "combine"] * 3
        assert [entry["sequence"] for entry in operations] == [1, 1, 2, 2, 3, 3]
        for entry in operations:
            fixed = dict(half="BOTH", slot=0, routing=1, tokens=COUNTS[rank], outcome="A2A_SUCCESS")
            assert {name: entry[name] for name in fixed} == fixed
        ends = [entry["begun_us"] + entry["took_us"] for entry in operations]
        begins = [entry["begun_us"] for entry in operations]
        assert all(end <= begin + 1 for end, begin in zip(ends, begins[1:]))  # each is cut to whole microseconds
        assert ends[-1] <= told["age_us"] + 1


def hang(rank, group, seen):
    """Rank 0 waits for rank 1, which leaves when it has been seen to wait."""
    x, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32")
    with ranks.Rank(rank, group, "flashinfer_nvlink_one_sided", "rank_major", COUNTS, "float32") as me:
        if rank == 1:
            assert seen.wait(60)
            return me.comm.history()
        failures = []

        def call():
            with pytest.raises(a2a.PeerLostError) as failure:
                me.dispatch(x, ids, weights)
            failures.append(failure.value.ranks)

        thread = threading.Thread(target=call)
        thread.start()
        while not (during := me.comm.history()["operations"]) and thread.is_alive():
            time.sleep(0.001)
        seen.set()
        thread.join()
        return during, failures, me.comm.history()


def test_an_operation_that_hangs(threads):
    (during, failures, after), idle = ranks.together(threads, 2, hang, threading.Event())
    assert idle["operations"] == []
    [operation] = during
    assert (operation["operation"], operation["half"], operation["tokens"]) == ("dispatch", "BOTH", COUNTS[0])
    assert operation["outcome"] == "in flight"
    assert failures == [(1,)]
    [operation] = after["operations"]
    assert operation["outcome"] == "A2A_PEER_LOST" and "rank 1 is gone" in after["async_error"]
    assert after["dead_ranks"] == []  # a thread of this process
