"""NIXL_ELASTIC from Python: the layer's bits, and a rank that comes later. A2A_NIXL_LIB names the library (`make test-python`
installs one)."""

import os
import socket
import threading

import a2a
import pytest

import ranks

pytestmark = pytest.mark.skipif("A2A_NIXL_LIB" not in os.environ, reason="A2A_NIXL_LIB names no NIXL library")

COUNTS = [5, 0, 8]


def test_round_trip(threads):
    outcomes = ranks.together(threads, len(COUNTS), ranks.run_rank, "nixl_ep", "expert_padded", COUNTS, "float32")
    for rank, outcome in enumerate(outcomes):
        wanted = ranks.alone(*ranks.tokens_of(rank, COUNTS[rank], "float32"), len(COUNTS), "expert_padded")
        assert [got.tobytes() for got in outcome] == [wanted.tobytes()] * 3


def test_a_rank_comes_later(threads):
    """Rank 0 begins alone in a group of up to two, warms up, takes rank 1 in, and lets it go."""
    address, met = f"127.0.0.1:{free_port()}", threading.Barrier(2)

    def run(rank, _group):
        x, ids, weights = ranks.tokens_of(rank, 4, "float32")
        ids[ids >= 0] %= 4
        config = ranks.config_of(
            rank, 1, a2a.UniqueId.from_address(address, "a key"), "nixl_ep", 4, "float32", max_ranks=2, num_experts=4
        )
        with a2a.Comm(config) as comm, comm.routing() as routing:
            def step():
                received = comm.dispatch(routing, x, ids, weights)
                status = received.status.tolist()
                return comm.combine(routing, received.tokens), status

            assert comm.rank_mask() == (rank == 0, rank == 1)
            met.wait(30)
            comm.connect_ranks([0, 1])
            generation = comm.activate_ranks([0, 1])
            assert comm.rank_mask() == (True, True)
            y, status = step()
            assert status == [0, 0, 0, status[3], 0, 0]
            met.wait(30)
            comm.set_rank_mask([r == rank for r in range(2)])
            step()
            comm.set_rank_mask([1, 1])
            met.wait(30)
            if rank == 0:
                assert comm.activate_ranks([0]) > generation
                comm.disconnect_ranks([1])
                assert comm.rank_mask() == (True, False)
                _, status = step()
                assert status[0] == a2a.StepFlag.BAD_ID
            met.wait(30)
            return y.tolist(), sums(x, ids, weights).tolist()

    for got, wanted in ranks.together(threads, 2, run):
        assert got == wanted


def sums(x, ids, weights):
    """What combine makes of experts that give back what they get, k ascending."""
    total = x * 0
    for k in range(ids.shape[1]):
        total += weights[:, k : k + 1] * x * (ids[:, k : k + 1] >= 0)
    return total


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
