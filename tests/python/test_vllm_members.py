"""Ranks that come, go and die under the managers that know of it: NixlEPAll2AllManager, and DeepEPLLAll2AllManager after a loss."""

import os
import threading

import a2a
import a2a_vllm
import numpy as np
import pytest
from a2a_vllm.prepare_finalize import TopKWeightAndReduceNoOP as NoOP
from test_vllm_managers import NEEDS_NIXL, engine_of, kernel_of
from vllm_ranks import COUNTS, EXPERTS, HIDDEN, RANKS, Ranks, array_of, expert, layer, numpy_of, owned, tokens_of

LOCAL = EXPERTS // RANKS


@pytest.fixture
def ranks():
    """Of each test its own: some do not outlive it."""
    made = Ranks()
    yield made
    made.close()


def step(buffer, rank, present, layout=RANKS):
    """A step with the tokens of `present` ranks, whose experts alone are there; it gives what plain numpy does."""
    x, weights, ids = tokens_of(rank, COUNTS[rank])
    a1 = array_of("numpy", x, "bfloat16")
    dispatch = buffer.dispatch if hasattr(buffer, "dispatch") else buffer.low_latency_dispatch
    combine = buffer.combine if hasattr(buffer, "combine") else buffer.low_latency_combine
    rows, counts, handle, _, hook = dispatch(a1, ids, 16, EXPERTS, use_fp8=False, return_recv_hook=True)
    hook()
    assert rows.shape == (LOCAL, 16 * layout, HIDDEN)
    mine, results = owned(rank, RANKS), np.full(rows.shape, np.nan, np.float32)
    for local, number in enumerate(mine):
        assert counts[local] == sum(number in chosen for r in present for chosen in tokens_of(r, COUNTS[r])[2])
        results[local, : counts[local]] = expert(number, numpy_of(rows[local, : counts[local]]))
    out, _, hook = combine(array_of("numpy", results, "bfloat16"), ids, weights, handle, return_recv_hook=True)
    hook()
    there = [number for r in present for number in owned(r, RANKS)]
    assert (numpy_of(out) == layer(x, weights, ids, there)).all()
    return rows.ctypes.data


def manager_of(kind, rank, size, store, prefix, **fields):
    group = a2a_vllm.StoreGroup(rank, size, store, prefix)
    a2a_vllm.use(a2a_vllm.Engine(a2a_vllm.Group(rank, size, group), max_num_batched_tokens=16, **fields))
    return getattr(a2a_vllm, kind)(group), group


LIMITS = dict(max_num_tokens_per_dp_rank=16, token_hidden_size=HIDDEN, num_local_experts=LOCAL)


def two_four_two(rank, size, store):
    """Two ranks serve; two more come, warm up and take part; then they go."""
    fields = dict(max_ep_ranks=4)
    if rank < 2:
        old, _ = manager_of("NixlEPAll2AllManager", rank, 2, store, "two", **fields)
        with pytest.raises(RuntimeError, match="has no NIXL buffer yet"):
            old.stage_ep_size()
        buffer = old.get_handle(dict(LIMITS))
        assert old.max_num_ep_ranks == 4 and old.max_sms_used() == 0 and old.support_fault_tolerance
        with pytest.raises(ValueError, match="asks for .*16.*48.*3.*, the process's one buffer was made for .*2"):
            old.get_handle(LIMITS | dict(num_local_experts=3))
        at = {step(buffer, rank, (0, 1)) for _ in range(4)}
        assert len(at) == 2  # one for each slot

        manager, group = manager_of("NixlEPAll2AllManager", rank, 4, store, "four", **fields)
        staging = threading.Thread(target=manager.stage_ep_size)
        staging.start()
        for _ in range(6):  # serving goes on
            at.add(step(buffer, rank, (0, 1)))
        staging.join()
        at.add(step(buffer, rank, (0, 1)))
        assert manager.query_active_mask().tolist() == [0, 0]
        group.all_gather_object("warm")
        manager.commit_ep_size()
        old.destroy()
        assert manager.get_handle(dict(LIMITS)) is buffer
    else:
        manager, group = manager_of("NixlEPAll2AllManager", rank, 4, store, "four", **fields)
        buffer = manager.get_handle(dict(LIMITS))
        with manager.mask_remote_ranks():
            at = {step(buffer, rank, (rank,)) for _ in range(4)}
        group.all_gather_object("warm")
    for _ in range(4):
        at.add(step(buffer, rank, range(4)))
    assert len(at) == 2  # captured graphs would still know where rows are
    assert manager.query_active_mask().tolist() == [0] * 4 and not manager.query_fault()
    group.all_gather_object("served by four")

    if rank < 2:
        last, group = manager_of("NixlEPAll2AllManager", rank, 2, store, "two again", **fields)
        last.stage_ep_size()
        last.commit_ep_size()
        last.get_handle(dict(LIMITS))
        manager.destroy()
        assert last.query_active_mask().tolist() == [0, 0]
        for _ in range(2):
            step(buffer, rank, (0, 1))
        group.all_gather_object("quiet")
        if rank == 0:  # a rank that takes part warms up again, alone
            with last.mask_remote_ranks():
                step(buffer, rank, (0,))
        group.all_gather_object("warm again")
        step(buffer, rank, (0, 1))
        group.all_gather_object("served by two")
        manager = last
    manager.destroy()
    manager.destroy()
    with pytest.raises(RuntimeError, match="has no NIXL buffer yet"):
        manager.query_fault()


@NEEDS_NIXL
def test_two_four_two(ranks):
    ranks.run(two_four_two)


def one_dies(rank, size, store, kind):
    """The last rank dies; the others see who, clean up, and go on without it."""
    degrades = kind == "NixlEPAll2AllManager"
    manager, group = manager_of(kind, rank, size, store, "all", enable_fault_tolerance=True)
    assert manager.support_fault_tolerance
    buffer = manager.get_handle(dict(LIMITS) if degrades else LIMITS | dict(num_ep_ranks=size, num_global_experts=EXPERTS))
    step(buffer, rank, range(4))
    assert not manager.query_fault() and manager.query_active_mask().tolist() == [0] * 4
    group.all_gather_object("served by four")
    if rank == 3:
        os._exit(1)
    if degrades:  # the step goes on without it
        step(buffer, rank, range(3))
    else:
        with pytest.raises(a2a.PeerLostError) as caught:
            step(buffer, rank, range(4))
        assert caught.value.ranks == (3,)
    mask = manager.query_active_mask()
    assert mask.dtype == np.int32 and mask.tolist() == [0, 0, 0, 1] and manager.query_fault()
    manager.clean_buffers()
    assert not manager.query_fault() and manager.query_active_mask().tolist() == [0, 0, 0, 1]
    for _ in range(3):
        step(buffer, rank, range(3))
    survivors = type(group)(rank, 3, store, "survivors")
    survivors.all_gather_object("served by three")
    manager.destroy()


def one_dies_under_standard_rows(rank, size, store, name):
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = tokens_of(rank, COUNTS[rank])

    def layer_of(present):
        mine, there = owned(rank, size), [number for r in present for number in owned(r, size)]
        a1 = array_of("numpy", x, "bfloat16")
        rows, _, _, got_ids, got_weights = kernel.prepare(a1, weights, ids, EXPERTS, None, False)
        output = np.empty_like(a1)
        results = array_of("numpy", layer(numpy_of(rows), got_weights, got_ids, mine), "bfloat16")
        kernel.finalize(output, results, got_weights, got_ids, False, NoOP())
        assert (numpy_of(output) == layer(x, weights, ids, there)).all()

    layer_of(range(4))
    # Another micro-batch is between dispatch and combine when it happens.
    kernel.prepare(array_of("numpy", x, "bfloat16"), weights, ids, EXPERTS, None, False)
    engine.ubatch = 1
    assert not manager.query_fault() and manager.query_active_mask().tolist() == [0] * 4
    group.all_gather_object("served by four")
    if rank == 3:
        os._exit(1)
    with pytest.raises(a2a.PeerLostError):
        layer_of(range(4))
    assert manager.query_fault() and manager.query_active_mask().tolist() == [0, 0, 0, 1]
    manager.clean_buffers()
    assert not manager.query_fault() and manager.query_active_mask().tolist() == [0, 0, 0, 1]
    for ubatch in (0, 1, 0):
        engine.ubatch = ubatch
        layer_of(range(3))
    type(group)(rank, 3, store, "survivors").all_gather_object("served by three")
    manager.destroy()


@pytest.mark.parametrize("name", ["ht", "one_sided", "two_sided"])
def test_one_dies_under_standard_rows(ranks, name):
    ranks.run(one_dies_under_standard_rows, name, gone=(3,))


@pytest.mark.parametrize("kind", ["DeepEPLLAll2AllManager", pytest.param("NixlEPAll2AllManager", marks=NEEDS_NIXL)])
def test_one_dies(ranks, kind):
    ranks.run(one_dies, kind, gone=(3,))
