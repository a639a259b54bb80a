"""Each manager of a2a_vllm over 4 processes, through prepare and finalize, against the plain layer of vllm_ranks.py."""

import contextlib
import importlib.util
import os
import time

import a2a_vllm
import numpy as np
import pytest
import vllm_ranks
from a2a_vllm import StoreGroup, groups
from a2a_vllm import prepare_finalize as kernels
from a2a_vllm.prepare_finalize import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from vllm_ranks import COUNTS, EXPERTS, HIDDEN, TOPK, Ranks, array_of, expert, layer, library_of, numpy_of, owned, tokens_of


def gpus():
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: numpy's tensors alone are tried")
NEEDS_GPUS = pytest.mark.skipif(gpus() < 2, reason="torch sees no two GPUs, one for each rank")
NEEDS_NIXL = pytest.mark.skipif(not os.environ.get("A2A_NIXL_LIB"), reason="A2A_NIXL_LIB names no NIXL")
STANDARD = ["agrs", "ht", "one_sided", "two_sided"]
BATCHED = ["ll", "nixl"]
# All, as arguments of tests.
KERNELS = [*STANDARD, "ll", pytest.param("nixl", marks=NEEDS_NIXL)]


@pytest.fixture(scope="module")
def ranks():
    made = Ranks()
    yield made
    made.close()


@contextlib.contextmanager
def group_of(library, rank, size, store):
    """torch's own ProcessGroup for torch."""
    if library not in ("torch", "cuda"):
        yield StoreGroup(rank, size, store)
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{store.directory}/gloo", rank=rank, world_size=size)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def engine_of(rank, size, store, group=None, **fields):
    """Names an engine whose ranks are all data-parallel."""
    group = group or StoreGroup(rank, size, store)
    engine = a2a_vllm.Engine(a2a_vllm.Group(rank, size, group), max_num_batched_tokens=16, local_sizes=COUNTS[:size], **fields)
    a2a_vllm.use(engine)
    return engine, group


def kernel_of(name, group, size, topk=TOPK, **arguments):
    """A manager, and what the modular kernel calls of it."""
    local = EXPERTS // size
    if name == "agrs":
        manager = a2a_vllm.AgRsAll2AllManager(group)
        return manager, kernels.MoEPrepareAndFinalizeNaiveDPEPModular(manager, num_dispatchers=size, **arguments)
    if name == "ht":
        manager = a2a_vllm.DeepEPHTAll2AllManager(group)
        return manager, kernels.DeepEPHTPrepareAndFinalize(manager.get_handle({}), size, size, manager.rank * local, **arguments)
    if name == "ll":
        manager = a2a_vllm.DeepEPLLAll2AllManager(group)
        handle = manager.get_handle(dict(max_num_tokens_per_dp_rank=16, token_hidden_size=HIDDEN, num_ep_ranks=size,
                                         num_global_experts=EXPERTS, num_local_experts=local))
        return manager, kernels.DeepEPLLPrepareAndFinalize(handle, 16, size, **arguments)
    if name == "nixl":
        manager = a2a_vllm.NixlEPAll2AllManager(group)
        handle = manager.get_handle(dict(max_num_tokens_per_dp_rank=16, token_hidden_size=HIDDEN, num_local_experts=local))
        most = manager.max_num_ep_ranks
        return manager, kernels.NixlEPPrepareAndFinalize(handle, 16, most, local * most, **arguments)
    if name == "one_sided":
        manager = a2a_vllm.FlashInferNVLinkOneSidedManager(group)
        return manager, kernels.FlashInferNVLinkOneSidedPrepareAndFinalize(
            manager, 16, topk, EXPERTS, HIDDEN, num_dispatchers=size, **arguments)
    manager = a2a_vllm.FlashInferNVLinkTwoSidedManager(group)
    return manager, kernels.FlashInferNVLinkTwoSidedPrepareAndFinalize(manager, num_dispatchers=size, **arguments)


def one_layer(rank, size, store, name, library, dtype, ids_dtype):
    with group_of(library, rank, size, store) as group:
        fields = {}
        if library == "cuda":
            import torch

            torch.cuda.set_device(rank)
            fields = dict(device=(2, rank))
        engine_of(rank, size, store, group, **fields)
        layer_over(group, rank, size, name, library, dtype, ids_dtype)


def failures_of(manager):
    """What the manager's comms have recorded: on a stream a step fails without raising."""
    if isinstance(manager, a2a_vllm.NixlEPAll2AllManager):
        wires = [manager._state.buffer.wire]
    else:
        used = manager._comms.values() if isinstance(manager, a2a_vllm.AgRsAll2AllManager) else manager._used()
        wires = [wire for comms in used for wire in comms]
    return [wire.comm.async_error() for wire in wires]


def layer_over(group, rank, size, name, library, dtype, ids_dtype):
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = tokens_of(rank, COUNTS[rank])
    a1, w, i = array_of(library, x, dtype), array_of(library, weights, "float32"), array_of(library, ids, ids_dtype)
    mine = owned(rank, size)
    for _ in range(3):
        rows, scales, meta, got_ids, got_weights = kernel.prepare(a1, w, i, EXPERTS, None, False)
        assert scales is None and library_of(rows) == library_of(a1) and rows.device == a1.device
        if name in STANDARD:
            values, got_w, got_i = numpy_of(rows), numpy_of(got_weights), numpy_of(got_ids)
            assert rows.shape[1:] == (HIDDEN,) and got_ids.shape == got_weights.shape == (len(values), TOPK)
            came = [(sx[t], sw[t], si[t]) for sx, sw, si in (tokens_of(r, COUNTS[r]) for r in range(size)) for t in range(len(sx))
                    if name == "agrs" or any(e in mine for e in si[t])]
            there = (got_i >= 0).any(1) if name != "agrs" else np.ones(len(values), bool)
            assert there.sum() == len(came)
            for at, (tx, tw, ti) in zip(np.flatnonzero(there), came):
                assert (values[at] == tx).all() and (got_w[at] == tw).all() and (got_i[at] == ti).all()
            assert (values[~there] == 0).all() and (got_i[~there] == -1).all() and (got_w[~there] == 0).all()
            if meta is not None:
                counts = [sum(e in chosen for chosen in got_i) for e in mine]
                assert numpy_of(meta.expert_num_tokens).tolist() == counts == numpy_of(meta.expert_num_tokens_cpu).tolist()
            experts, impl = array_of(library, layer(values, got_w, got_i, mine), dtype), TopKWeightAndReduceNoOP()
        else:
            assert rows.shape == (len(mine), 16 * size, HIDDEN) and got_ids is None and got_weights is None
            got_ids, got_weights, impl = i, w, TopKWeightAndReduceDelegate()
            values, counts = numpy_of(rows), numpy_of(meta.expert_num_tokens)
            results = np.full(values.shape, np.nan, np.float32)
            for local, number in enumerate(mine):
                came = [sx[t] for sx, _, si in (tokens_of(r, COUNTS[r]) for r in range(size)) for t in range(len(sx)) if number in si[t]]
                assert counts[local] == len(came) and (values[local, : len(came)] == np.array(came).reshape(-1, HIDDEN)).all()
                results[local, : len(came)] = expert(number, values[local, : len(came)])
            experts = array_of(library, results, dtype)
        output = array_of(library, np.full(x.shape, np.nan), dtype)
        kernel.finalize(output, experts, got_weights, got_ids, False, impl)
        assert (numpy_of(output) == layer(x, weights, ids)).all(), failures_of(manager)
    assert (numpy_of(a1) == x).all() and (numpy_of(i) == ids).all()
    if library == "cuda":
        import torch

        torch.cuda.synchronize()  # so that what a step left behind is seen here, whatever destroy waits for
        assert not any(failures_of(manager)), failures_of(manager)
    manager.destroy()
    manager.destroy()


def late_or_not(rank, size, store, seconds):
    time.sleep(seconds if rank == 0 else 0)
    return seconds


def test_a_late_answer_is_nobody_elses(monkeypatch):
    """Of the harness: a rank that has not answered in time is replaced."""
    made = Ranks(2)
    try:
        assert made.run(late_or_not, 0) == [0, 0]
        monkeypatch.setattr(vllm_ranks, "PATIENCE", 0.5)
        with pytest.raises(AssertionError, match="rank 0: TimeoutError.*no answer within 0.5 s"):
            made.run(late_or_not, 1.5)
        monkeypatch.undo()
        time.sleep(1.5)
        assert made.run(late_or_not, 0) == [0, 0]
    finally:
        made.close()


def test_groups_of_each_kind():
    class Stateless:
        """As vLLM's StatelessProcessGroup is."""

        rank, world_size = 1, 3

        def all_gather_obj(self, value):
            return [value] * 3

    class Own(Stateless):
        """As engine.ProcessGroup is."""

        all_gather_obj = None
        rank, size = (lambda self: 1), (lambda self: 3)

        def all_gather_object(self, value):
            return [value] * 3

    for group in (Stateless(), Own()):
        assert (groups.member(group, "rank"), groups.member(group, "size"), groups.gather(group, "x")) == (1, 3, ["x"] * 3)
    assert groups.gather(None, "x") == ["x"]


@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=NEEDS_TORCH)])
@pytest.mark.parametrize("dtype, ids_dtype", [("bfloat16", "int64"), ("float16", "int32")])
@pytest.mark.parametrize("name", KERNELS)
def test_a_layer(ranks, name, library, dtype, ids_dtype):
    ranks.run(one_layer, name, library, dtype, ids_dtype)


@NEEDS_GPUS
@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_on_gpus(ranks, name):
    ranks.run(one_layer, name, "cuda", "bfloat16", "int64", ranks=range(2))
