"""What the managers' own calls and handles give: each library's dialect, limits, sharing, ends, errors. 4 processes, CPU memory."""

import gc
import sys
import types

import a2a
import a2a_vllm
import numpy as np
import pytest
from a2a_vllm.prepare_finalize import TopKWeightAndReduceDelegate as Delegate
from a2a_vllm.prepare_finalize import TopKWeightAndReduceNoOP as NoOP
from test_vllm_managers import BATCHED, KERNELS, STANDARD, engine_of, kernel_of, ranks  # noqa: F401 (a fixture)
from vllm_ranks import COUNTS, EXPERTS, HIDDEN, TOPK, array_of, expert, layer, numpy_of, owned, tokens_of


def given(rank, dtype="float32", ids_dtype="int64", **shape):
    x, weights, ids = tokens_of(rank, COUNTS[rank], **shape)
    return array_of("numpy", x, dtype), weights, ids.astype(ids_dtype)


def raises(kind, text, function, *arguments, **keywords):
    with pytest.raises(kind, match=text):
        function(*arguments, **keywords)


# ------------------------------------------------------------------------------------- allgather_reducescatter: dispatch, combine


def gathers_any_rows(rank, size, store):
    engine, group = engine_of(rank, size, store)
    manager = a2a_vllm.AgRsAll2AllManager(group)
    assert manager.max_sms_used() is None and manager.set_num_sms(4) is None
    raises(NotImplementedError, "AgRsAll2AllManager has no get_handle: dispatch and combine are its own", manager.get_handle, {})

    def made(r):
        random = np.random.default_rng(r)
        n = COUNTS[r]
        return [random.integers(0, 99, (n, 32)).astype(np.uint8), random.random((n, 7), np.float32),
                random.integers(0, 9, n).astype(np.int32), random.random((n, 2, 3))]

    packed, logits, lora, cube = made(rank)
    every = [np.concatenate([made(r)[i] for r in range(size)]) for i in range(4)]
    assert len(manager.dispatch_router_logits(packed, logits)) == 2
    got = manager.dispatch_router_logits(packed, logits, extra_tensors=[lora, cube])
    assert len(got) == 3
    for theirs, ours in zip(every, [*got[:2], *got[2]]):
        assert ours.dtype == theirs.dtype and (ours == theirs).all()
    # What was gathered is the caller's: later steps leave it alone.
    for _ in range(3):
        got_again = manager.dispatch(packed + 1, logits, lora.reshape(-1, 1), extra_tensors=[])
        assert len(got_again) == 4 and got_again[3] == []
    assert (got[0] == every[0]).all()

    # A combine is of any width and type, after a dispatch that was smaller, and after none.
    total, begin = sum(COUNTS), sum(COUNTS[:rank])
    for dtype, width in (("float32", 64), ("bfloat16", 256), ("float16", 8)):
        values = [np.random.default_rng(r).integers(-4, 5, (total, width)) for r in range(size)]
        rows = array_of("numpy", values[rank], dtype)
        for _ in range(2):
            summed = manager.combine(rows)
            assert summed.dtype == rows.dtype and (numpy_of(summed) == sum(values)[begin : begin + COUNTS[rank]]).all()
        output = np.empty_like(summed)
        assert manager.combine_into_output(rows, output) is output and (output == summed).all()
    # An output that is not compact is written where it lies.
    wide = np.full((COUNTS[rank], 2, 3, 8), np.nan, np.float32)
    values = [np.random.default_rng(r).integers(-4, 5, (total, 2, 8)).astype(np.float32) for r in range(size)]
    assert (manager.combine_into_output(values[rank], wide[:, :, 1]) == sum(values)[begin : begin + COUNTS[rank]]).all()
    assert (wide[:, :, 1] == sum(values)[begin : begin + COUNTS[rank]]).all() and np.isnan(wide[:, :, ::2]).all()
    raises(NotImplementedError, "AgRsAll2AllManager has no mask of ranks", manager.query_fault)
    assert manager.allocate_combine_input((total, 8), np.float32, None) is None
    raises(ValueError, f"rank {rank}: combine has {total - 1} rows, the group's sizes are", manager.combine, rows[1:])
    raises(ValueError, f"rank {rank}: tensor 0 of dispatch has {COUNTS[rank] + 1} rows", manager.dispatch,
           np.zeros((COUNTS[rank] + 1, 8), np.float32), logits, lora)
    raises(ValueError, "beside hidden_states, the limit is 8", manager.dispatch, packed, logits, lora, extra_tensors=[lora] * 7)
    engine.local_sizes = [1, 2]
    raises(ValueError, f"rank {rank}: the engine's sizes are .*for 2 ranks; the group of this call has 4", manager.combine, rows)
    manager.destroy()


def test_gathers_any_rows(ranks):  # noqa: F811
    ranks.run(gathers_any_rows)


def gathers_over_the_right_group(rank, size, store):
    """Two data-parallel replicas of two tensor-parallel ranks: inputs are the replica's, or, sequence-parallel, a rank's own."""
    whole = a2a_vllm.StoreGroup(rank, size, store)
    replica, column = divmod(rank, 2)
    across = a2a_vllm.Group(replica, 2, a2a_vllm.StoreGroup(replica, 2, store, f"column{column}"))
    engine = a2a_vllm.Engine(a2a_vllm.Group(rank, size, whole), dp_group=across, tp_group=a2a_vllm.Group(column, 2), local_sizes=[3, 1])
    a2a_vllm.use(engine)
    manager = a2a_vllm.AgRsAll2AllManager(whole)
    own = [3, 1][replica]
    x, weights, ids = (array[:own] for array in tokens_of(replica, 3))
    for _ in range(2):
        rows, _, _ = manager.dispatch(x, weights, ids)
        assert (rows == np.concatenate([tokens_of(0, 3)[0][:3], tokens_of(1, 3)[0][:1]])).all()
        # A tensor-parallel rank has the experts of its own: the other's share is added after, as output_is_reduced says.
        assert (manager.combine(rows * (column + 1)) == 2 * (column + 1) * x).all()
        engine.local_sizes = [2, 2, 1, 1]
        own = engine.local_sizes[rank]
        rows, _, _ = manager.dispatch(x[:own] + rank, weights[:own], ids[:own], is_sequence_parallel=True)
        assert len(rows) == 6 and (manager.combine(rows, is_sequence_parallel=True) == 4 * (x[:own] + rank)).all()
        engine.local_sizes, own = [3, 1], [3, 1][replica]
    manager.destroy()


def test_gathers_over_the_right_group(ranks):  # noqa: F811
    ranks.run(gathers_over_the_right_group)


# ------------------------------------------------------------------------------------------------------------------- DeepEP


def high_throughput_speaks_deep_ep(rank, size, store):
    engine, group = engine_of(rank, size, store)
    manager = a2a_vllm.DeepEPHTAll2AllManager(group)
    raises(ValueError, "takes an empty dict, it was given tokens", manager.get_handle, dict(tokens=1))
    assert manager.set_num_sms(64) == 20 and manager.max_sms_used() is None
    buffer = manager.get_handle({})
    assert manager.get_handle({}) is buffer and buffer.num_sms == 20
    assert manager.set_num_sms(6) == 6 == buffer.num_sms
    experts = 10  # 3, 3, 2 and 2 of them
    first = [0, 3, 6, 8, 10]
    x, weights, ids = given(rank, experts=experts)
    for dtype in ("int64", "int32"):
        ids = ids.astype(dtype)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, experts)
        assert per_rank.dtype == per_expert.dtype == np.int32 and per_rdma_rank is None
        assert per_expert.tolist() == [(ids == e).sum() for e in range(experts)]
        plain = np.array([[any(first[r] <= e < first[r + 1] for e in chosen) for r in range(size)] for chosen in ids], bool).reshape(-1, size)
        assert (in_rank == plain).all() and per_rank.tolist() == plain.sum(0).tolist()
        rows, local, got_weights, counts, handle, event = buffer.dispatch(
            x, None, per_rank, per_rdma_rank, in_rank, per_expert, ids, weights, expert_alignment=4, async_finish=True)
        event.current_stream_wait()
        mine = range(first[rank], first[rank + 1])
        came = [(sx[t], sw[t], [e - first[rank] if e in mine else -1 for e in si[t]])
                for sx, sw, si in (tokens_of(r, COUNTS[r], experts=experts) for r in range(size)) for t in range(len(sx))
                if any(e in mine for e in si[t])]
        assert local.dtype == ids.dtype and len(rows) == len(came)
        for at, (tx, tw, ti) in enumerate(came):
            assert (rows[at] == tx).all() and (got_weights[at] == tw).all() and local[at].tolist() == ti
        assert counts == [-(-sum(e in chosen for *_, chosen in came) // 4) * 4 for e in range(len(mine))]
        summed, none, _ = buffer.combine(rows * 2, handle)
        assert none is None and (summed == 2 * plain.sum(1)[:, None] * x).all()
    # Rows that are quantised already come with their scales.
    scales = np.arange(len(x) * 2, dtype=np.float32).reshape(-1, 2) + 100 * rank
    codes = array_of("numpy", x, "float8_e4m3fn")
    (rows, row_scales), *_, handle, _ = buffer.dispatch(
        (codes, scales), num_tokens_per_expert=per_expert, topk_idx=ids, topk_weights=weights)
    assert rows.dtype == codes.dtype and row_scales.shape == (len(rows), 2)
    assert (numpy_of(rows) == np.array([tx for tx, *_ in came]).reshape(-1, HIDDEN)).all()
    assert (row_scales[:, 1] - row_scales[:, 0] == 1).all()
    assert (numpy_of(buffer.combine(array_of("numpy", numpy_of(rows), "bfloat16"), handle)[0]) == plain.sum(1)[:, None] * x).all()
    raises(ValueError, "no handle: a routing that is used again", buffer.dispatch, x, handle)
    raises(ValueError, "combine takes no topk_weights", buffer.combine, x, handle, weights)
    for call in (lambda: manager.dispatch(x, weights, ids), lambda: manager.combine(x), lambda: manager.dispatch_router_logits(x, x)):
        raises(NotImplementedError, "DeepEPHTAll2AllManager has no .*: its rows travel through what get_handle gives", call)
    manager.destroy()


def test_high_throughput_speaks_deep_ep(ranks):  # noqa: F811
    ranks.run(high_throughput_speaks_deep_ep)


def low_latency_speaks_deep_ep(rank, size, store):
    engine, group = engine_of(rank, size, store)
    manager = a2a_vllm.DeepEPLLAll2AllManager(group)
    limits = dict(max_num_tokens_per_dp_rank=16, token_hidden_size=256, num_ep_ranks=size, num_global_experts=EXPERTS,
                  num_local_experts=EXPERTS // size)
    buffer = manager.get_handle(limits)
    assert manager.get_handle(dict(limits)) is buffer and manager.max_sms_used() == 0
    assert manager.get_handle(limits | dict(max_num_tokens_per_dp_rank=4)) is not buffer
    raises(ValueError, f"rank {rank}: 8 experts on 4 ranks, 3 of them here", manager.get_handle, limits | dict(num_local_experts=3))
    raises(Exception, "max_hidden", manager.get_handle, limits | dict(token_hidden_size=7))
    mine = owned(rank, size)
    for hidden in (48, 256):
        x, weights, ids = given(rank, "bfloat16", hidden=hidden)
        for step in range(4):
            stats = np.zeros(len(mine), np.int64)
            rows, counts, handle, event, hook = buffer.low_latency_dispatch(
                x, ids, 12, EXPERTS, cumulative_local_expert_recv_stats=stats, use_fp8=False, return_recv_hook=True)
            hook()
            assert rows.shape == (len(mine), 12 * size, hidden) and counts.dtype == np.int32 and (stats == counts).all()
            sys.modules["torch"] = types.ModuleType("torch")  # somebody else's: rows are numpy's still
            results = buffer.get_next_low_latency_combine_buffer(handle)
            del sys.modules["torch"]
            for local, number in enumerate(mine):
                results[local, : counts[local]] = expert(number, numpy_of(rows[local, : counts[local]]))
            out, _, hook = buffer.low_latency_combine(results, ids, weights, handle, zero_copy=True, return_recv_hook=True)
            hook()
            assert (numpy_of(out) == layer(numpy_of(x), weights, ids)).all()
    # In e4m3, with scales of a column each, float32 or powers of two packed in int32.
    for ue8m0 in (False, True):
        for later in (False, True, True, True):
            (rows, scales), counts, handle, _, hook = buffer.low_latency_dispatch(
                x, ids, 16, EXPERTS, round_scale=ue8m0, use_ue8m0=ue8m0, return_recv_hook=later)
            hook()
            assert rows.dtype.name == "float8_e4m3fn" and scales.dtype == (np.int32 if ue8m0 else np.float32)
            assert scales.shape == (len(mine), 16 * size, 1 if ue8m0 else 2) and scales.strides[1] == 4
            for local, number in enumerate(mine):
                came = np.array([sx[t] for sx, _, si in (tokens_of(r, COUNTS[r], hidden=256) for r in range(size))
                                 for t in range(len(sx)) if number in si[t]], np.float32).reshape(-1, 2, 128)
                s = scales[local, : counts[local]]
                s = np.stack([np.exp2((s[:, 0] >> shift & 255) - 127.0) for shift in (0, 8)], 1) if ue8m0 else s
                values = numpy_of(rows[local, : counts[local]]).reshape(-1, 2, 128) * s[:, :, None]
                assert (abs(values - came) <= abs(came) / 16 + 1e-6).all()
            buffer.low_latency_combine(array_of("numpy", np.ones(rows.shape), "bfloat16"), ids, weights, handle)
    raises(ValueError, "scales are float32 as they come out, or powers of two", buffer.low_latency_dispatch, x, ids, 16, EXPERTS,
           round_scale=True)
    raises(ValueError, f"rank {rank}: num_experts is 9, the buffer was made for 8", buffer.low_latency_dispatch, x, ids, 16, 9)
    sys.modules["torch"], mask = types.ModuleType("torch"), np.ones(size, np.int32)
    buffer.low_latency_query_mask_buffer(mask)
    del sys.modules["torch"]
    assert mask.tolist() == [0] * size == manager.query_active_mask().tolist() and not manager.query_fault()
    group.all_gather_object("all have asked")
    # A buffer that nobody holds is gone with its memory.
    assert len(manager.handle_cache.handles()) == 1
    del buffer, handle, hook, rows, results, scales, counts
    gc.collect()
    assert manager.handle_cache.handles() == []
    manager.destroy()


def test_low_latency_speaks_deep_ep(ranks):  # noqa: F811
    ranks.run(low_latency_speaks_deep_ep)


def send_waits_for_nobody(rank, size, store):
    """A dispatch and a combine whose receiving half comes later return before any peer has called."""
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of("ll", group, size)
    x, weights, ids = given(rank, "bfloat16")
    output = np.empty_like(x)
    for step in range(4):
        if step >= 2 and rank > 0:
            store.get(f"{step} sent")  # rank 0 has returned
        hook, receive = kernel.prepare_async(x, weights, ids, EXPERTS, None, False)
        if step >= 2 and rank == 0:
            store.set(f"{step} sent", "")
        hook()
        rows, _, meta, _, _ = receive()
        results = np.full(rows.shape, np.nan, np.float32)
        for local, number in enumerate(owned(rank, size)):
            count = meta.expert_num_tokens[local]
            results[local, :count] = expert(number, numpy_of(rows[local, :count]))
        if step >= 2 and rank > 0:
            store.get(f"{step} combined")
        hook, receive = kernel.finalize_async(output, array_of("numpy", results, "bfloat16"), weights, ids, False, Delegate())
        if step >= 2 and rank == 0:
            store.set(f"{step} combined", "")
        hook()
        receive()
        assert (numpy_of(output) == layer(numpy_of(x), weights, ids)).all()
    manager.destroy()


def test_send_waits_for_nobody(ranks):  # noqa: F811
    ranks.run(send_waits_for_nobody)


# ---------------------------------------------------------------------------------------------------------------- FlashInfer


def one_sided_grows(rank, size, store):
    engine, group = engine_of(rank, size, store)
    manager = a2a_vllm.FlashInferNVLinkOneSidedManager(group, tcp_store_group=None)
    assert manager.get_handle({}) is manager
    raises(RuntimeError, f"rank {rank}: there is no communication", manager.get_communication)
    raises(ValueError, "extra_payload_bytes_per_token is -1", manager.initialize, 16, TOPK, EXPERTS, HIDDEN, None, -1)
    raises(ValueError, "dispatch_format is 'INT3', known are BF16, FP16", manager.initialize, 16, TOPK, EXPERTS, HIDDEN, "INT3")
    manager.initialize(16, TOPK, EXPERTS, HIDDEN)
    first = manager.get_communication()
    manager.initialize(8, TOPK, EXPERTS, 16)
    assert manager.get_communication() is first
    manager.initialize(9, TOPK, EXPERTS, HIDDEN, "MXFP8", 6)
    second = manager.get_communication()
    assert second is not first and second.capacity.max_tokens == 16 and second.capacity.scale_bytes == 8
    raises(ValueError, f"rank {rank}: top_k is 2, other layers have 3", manager.initialize, 16, 2, EXPERTS, HIDDEN)
    raises(ValueError, f"rank {rank}: num_experts is 16, other layers have 8", manager.initialize, 16, TOPK, 16, HIDDEN)

    x, weights, ids = given(rank, "bfloat16", "int32")
    scales = np.full((len(x), 8), rank + 1, np.uint8)
    raises(RuntimeError, f"rank {rank}: micro-batch 0 has not dispatched", second.combine, x)
    for restored in range(2):
        communication = manager.get_communication()
        received = communication.dispatch(x, ids, weights, hidden_states_scale=scales, max_tokens_per_rank=9)
        mine = owned(rank, size)
        assert received.hidden_states.shape == (9 * size, HIDDEN) and received.hidden_states_scale.shape == (9 * size, 8)
        for source in range(size):
            sx, _, si = tokens_of(source, COUNTS[source])
            came = [t for t in range(len(sx)) if any(e in mine for e in si[t])]
            block, end = slice(9 * source, 9 * source + len(came)), slice(9 * source + len(came), 9 * source + 9)
            assert received.tokens_per_rank[source] == len(came)
            assert (numpy_of(received.hidden_states[block]) == sx[came]).all() and (received.topk_ids[block] == si[came]).all()
            assert (received.hidden_states_scale[block] == source + 1).all()
            assert (received.topk_ids[end] == -1).all() and (numpy_of(received.hidden_states[end]) == 0).all()
        raises(RuntimeError, f"rank {rank}: micro-batch 0 dispatches again before it has combined", communication.dispatch, x, ids, weights)
        results = communication.get_combine_input_buffer()
        results[...] = received.hidden_states
        there = [len({int(e) // (EXPERTS // size) for e in chosen if e >= 0}) for chosen in ids]
        assert (numpy_of(communication.combine(results)) == np.array(there).reshape(-1, 1) * numpy_of(x)).all()
        del received, results
        manager.checkpoint_prepare()
        raises(RuntimeError, "there is no communication: checkpoint_restore has not been called", manager.get_communication)
        manager.checkpoint_restore()
    # What was there comes back with a layer that asks for less, too, and restoring has nothing left to do.
    manager.checkpoint_prepare()
    manager.initialize(8, TOPK, EXPERTS, HIDDEN)
    communication = manager.get_communication()
    assert communication.capacity == second.capacity and communication is not second
    manager.checkpoint_restore()
    assert manager.get_communication() is communication
    received = communication.dispatch(x, ids, weights, max_tokens_per_rank=9)
    assert (numpy_of(communication.combine(received.hidden_states.copy())) == np.array(there).reshape(-1, 1) * numpy_of(x)).all()
    manager.checkpoint_prepare()
    manager.destroy()
    manager.checkpoint_restore()
    manager.destroy()
    assert not manager.initialized
    raises(RuntimeError, "there is no communication", manager.get_communication)


def test_one_sided_grows(ranks):  # noqa: F811
    ranks.run(one_sided_grows)


def two_sided_comes_with_the_first_step(rank, size, store):
    engine, group = engine_of(rank, size, store)
    alone = a2a_vllm.FlashInferNVLinkTwoSidedManager(a2a_vllm.StoreGroup(0, 1, store, f"alone{rank}"))
    assert alone.ensure_alltoall_workspace_initialized() is False
    raises(RuntimeError, "the group has one rank", alone.get_communication)
    manager = a2a_vllm.FlashInferNVLinkTwoSidedManager(group)
    raises(ValueError, f"rank is 0 of 9, the manager's group has rank {rank} of 4", manager.initialize, 9, 0, 1)
    manager.initialize(size, rank, 1)
    assert manager.initialized and manager.ensure_alltoall_workspace_initialized() is True and manager.get_handle({}) is manager
    x, weights, ids = given(rank, "bfloat16", "int32")
    scales = np.full((len(x), 3), rank + 1, np.float32)
    for largest in (9, 16, 33):
        received = manager.get_communication().dispatch(
            x, ids, weights, num_experts=EXPERTS, hidden_states_scale=scales, max_tokens_per_rank=largest)
        mine = owned(rank, size)
        came = [(r, sx[t], si[t]) for r, (sx, _, si) in enumerate(tokens_of(r, COUNTS[r]) for r in range(size)) for t in range(len(sx))
                if any(e in mine for e in si[t])]
        assert received.hidden_states.shape == (largest * size, HIDDEN)
        for at, (source, tx, ti) in enumerate(came):
            assert (numpy_of(received.hidden_states[at]) == tx).all() and (received.topk_ids[at] == ti).all()
            assert (received.hidden_states_scale[at] == source + 1).all()
        assert (received.topk_ids[len(came):] == -1).all() and (numpy_of(received.hidden_states[len(came):]) == 0).all()
        output = np.empty_like(x)
        manager.get_communication().combine(received.hidden_states, output=output)
        there = [len({int(e) // (EXPERTS // size) for e in chosen if e >= 0}) for chosen in ids]
        assert (numpy_of(output) == np.array(there).reshape(-1, 1) * numpy_of(x)).all()
    manager.cleanup()
    manager.destroy()


def test_two_sided_comes_with_the_first_step(ranks):  # noqa: F811
    ranks.run(two_sided_comes_with_the_first_step)


# -------------------------------------------------------------------------------------------------------- all, by their kernels


def two_micro_batches(rank, size, store, name):
    """Both are dispatched before either is combined."""
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = given(rank, "bfloat16", "int32")
    rows_of, mine = {}, owned(rank, size)
    for _ in range(2):
        for ubatch in (0, 1):
            engine.ubatch = ubatch
            rows_of[ubatch] = kernel.prepare(x * (ubatch + 1), weights, ids, EXPERTS, None, False)
        for ubatch in (0, 1):
            engine.ubatch = ubatch
            rows, _, meta, got_ids, got_weights = rows_of[ubatch]
            output, wide = np.empty_like(x), numpy_of(rows)
            if name in BATCHED:  # (token, expert) by (token, expert)
                results = np.stack([expert(number, wide[local]) for local, number in enumerate(mine)])
                got_ids, got_weights = ids, weights
            else:  # [rows, K, H], which finalize weights and sums
                results = np.stack([np.where([[e in mine] for e in got_ids[:, k]], [expert(max(e, 0), row) for e, row in
                                    zip(got_ids[:, k], wide)] if len(wide) else wide, 0) for k in range(TOPK)], 1)
            kernel.finalize(output, array_of("numpy", results, "bfloat16"), got_weights, got_ids, False, Delegate())
            assert (numpy_of(output) == layer(numpy_of(x) * (ubatch + 1), weights, ids)).all()
    manager.destroy()


@pytest.mark.parametrize("name", KERNELS)
def test_two_micro_batches(ranks, name):  # noqa: F811
    ranks.run(two_micro_batches, name)


def a_third_dispatch_takes_the_first_ones_slot(rank, size, store, name):
    """Two dispatches may be under way; what a third one gives up is refused, and never combined by the third's routing."""
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = given(rank, "bfloat16", "int64")
    ids = [ids, ids, ids[::-1].copy()]
    ones, handles, outputs = np.ones_like(weights), [], []
    for chosen in ids:
        if name == "ht":
            rows, *_, handle = kernel.buffer.dispatch_global(x, chosen, weights, EXPERTS)
        else:
            rows, _, handle, _, hook = kernel._dispatch(x, chosen, 16, EXPERTS, use_fp8=False, return_recv_hook=True)
            hook()
        handles.append((rows.copy(), handle))

    def combined(at):
        rows, handle = handles[at]
        if name == "ht":
            return kernel.buffer.combine(rows, handle)[0]
        return kernel._combined(rows, ids[at], ones, handle)[0]

    raises(RuntimeError, f"rank {rank}: dispatch 1 was given up for 3; slot 0 of 2 held it", combined, 0)
    if name != "ht":
        raises(RuntimeError, f"rank {rank}: dispatch 1 was given up for 3", kernel.buffer.get_next_low_latency_combine_buffer
               if name == "ll" else kernel.buffer.get_next_combine_buffer, handles[0][1])
    for at in (1, 2):
        where = [[int(e) // (EXPERTS // size) if name == "ht" else int(e) for e in chosen if e >= 0] for chosen in ids[at]]
        assert (numpy_of(combined(at)) == np.array([len(set(w)) for w in where]).reshape(-1, 1) * numpy_of(x)).all()
    manager.destroy()


@pytest.mark.parametrize("name", [kernel for kernel in KERNELS if kernel not in ("agrs", "one_sided", "two_sided")])
def test_a_third_dispatch_takes_the_first_ones_slot(ranks, name):  # noqa: F811
    ranks.run(a_third_dispatch_takes_the_first_ones_slot, name)


def a_micro_batch_keeps_its_slot(rank, size, store, name):
    """While one is between dispatch and combine, the other takes as many steps as it likes."""
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = given(rank, "bfloat16", "int32")
    mine, prepared = owned(rank, size), {}

    def prepare(ubatch, factor):
        engine.ubatch = ubatch
        chosen = ids if ubatch == 0 else ids[::-1].copy()  # other rows, so that the other's routing cannot do
        rows, _, _, got_ids, got_weights = kernel.prepare(x * factor, weights, chosen, EXPERTS, None, False)
        prepared[ubatch] = (factor, chosen, rows.copy(), got_ids.copy(), got_weights.copy())

    def finalize(ubatch):
        engine.ubatch = ubatch
        factor, chosen, rows, got_ids, got_weights = prepared[ubatch]
        output = np.empty_like(x)
        kernel.finalize(output, array_of("numpy", layer(numpy_of(rows), got_weights, got_ids, mine), "bfloat16"), got_weights, got_ids,
                        False, NoOP())
        assert (numpy_of(output) == layer(numpy_of(x) * factor, weights, chosen)).all()

    prepare(0, 1)
    for factor in (2, 1, 2):
        prepare(1, factor)
        finalize(1)
    finalize(0)
    engine.ubatch = 2
    raises(ValueError, f"rank {rank}: the engine's micro-batch is 2, it must be from 0 to 1", kernel.prepare, x, weights, ids, EXPERTS, None,
           False)
    manager.destroy()


@pytest.mark.parametrize("name", ["agrs", "one_sided", "two_sided"])
def test_a_micro_batch_keeps_its_slot(ranks, name):  # noqa: F811
    ranks.run(a_micro_batch_keeps_its_slot, name)


def a_refused_combine_is_called_again(rank, size, store, name):
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    x, weights, ids = given(rank, "bfloat16", "int32")
    rows, _, _, got_ids, got_weights = kernel.prepare(x, weights, ids, EXPERTS, None, False)
    if name in BATCHED:
        got_ids, got_weights, impl = ids, np.ones_like(weights), Delegate()
        where = [[int(e) for e in chosen if e >= 0] for chosen in ids]
    else:
        impl = NoOP()
        where = [[int(e) // (EXPERTS // size) for e in chosen if e >= 0] for chosen in ids]
    wanted = np.array([size if name == "agrs" else len(set(w)) for w in where]).reshape(-1, 1) * numpy_of(x)
    rows, output = rows.copy(), np.empty_like(x)
    raises(a2a.CallError, "float|dtype|type", kernel.finalize, np.empty(x.shape, np.int32), rows, got_weights, got_ids, False, impl)
    kernel.finalize(output, rows, got_weights, got_ids, False, impl)
    assert (numpy_of(output) == wanted).all()
    manager.destroy()


@pytest.mark.parametrize("name", KERNELS)
def test_a_refused_combine_is_called_again(ranks, name):  # noqa: F811
    ranks.run(a_refused_combine_is_called_again, name)


def nobody_has_a_token(rank, size, store, name):
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    engine.local_sizes = [0] * size
    x, weights, ids = given(rank, "bfloat16", "int32")
    for _ in range(2):
        rows, _, _, got_ids, got_weights = kernel.prepare(x[:0], weights[:0], ids[:0], EXPERTS, None, False)
        got_ids, got_weights = (ids[:0], weights[:0]) if name in BATCHED else (got_ids, got_weights)
        assert name in BATCHED or (got_ids == -1).all()
        kernel.finalize(x[:0], rows, got_weights, got_ids, False, Delegate() if name in BATCHED else NoOP())
    manager.destroy()


@pytest.mark.parametrize("name", KERNELS)
def test_nobody_has_a_token(ranks, name):  # noqa: F811
    ranks.run(nobody_has_a_token, name)


def weights_on_the_input(rank, size, store, name):
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size, topk=1)
    x, weights, ids = given(rank, "bfloat16", "int32", topk=1)
    before = x.copy()
    rows, _, _, got_ids, got_weights = kernel.prepare(x, weights, ids, EXPERTS, None, True)
    got_ids, got_weights = (ids, weights) if name in BATCHED else (got_ids, got_weights)
    results = rows if name in BATCHED else np.where(
        np.isin(got_ids, owned(rank, size)), numpy_of(rows), 0).astype(rows.dtype)[:, None]
    output = np.empty_like(x)
    kernel.finalize(output, results, got_weights, got_ids, True, Delegate())
    assert (x == before).all() and (numpy_of(output) == numpy_of(x) * weights).all()
    two = np.zeros((len(x), 2), np.int32)
    raises(ValueError, "apply_router_weight_on_input is for a top-k of 1, it is 2", kernel.prepare, x, two, two, EXPERTS, None, True)
    manager.destroy()


@pytest.mark.parametrize("name", KERNELS)
def test_weights_on_the_input(ranks, name):  # noqa: F811
    ranks.run(weights_on_the_input, name)


def quantised_by_the_engine(rank, size, store, name):
    """Scales travel with their rows, are arranged once they are here, and one value for all is not sent."""
    engine, group = engine_of(rank, size, store)
    extra = dict(extra_payload_bytes_per_token=8) if name == "one_sided" else {}
    x, weights, ids = given(rank, "bfloat16", "int32")
    config, mine = object(), owned(rank, size)

    def by_row(a1, given_config):
        assert given_config is config
        return array_of("numpy", numpy_of(a1), "float8_e4m3fn"), numpy_of(a1)[:, :2].copy()

    def arranged(scales, given_config):
        assert given_config is config
        return scales.T.copy()

    manager, kernel = kernel_of(name, group, size, quantize=by_row, arrange_scales=arranged, **extra)
    shared = np.float32(0.5)
    for case in ("by row", "one for all", "deferred"):
        kernel._quantize = by_row if case == "by row" else lambda a1, _: (a1, shared.reshape(()))
        rows, scales, _, got_ids, got_weights = kernel.prepare(x, weights, ids, EXPERTS, None, False, config, case == "deferred")
        if case == "by row":
            assert rows.dtype.name == "float8_e4m3fn" and (scales == numpy_of(rows)[:, :2].T).all()
        elif case == "one for all":
            assert scales == shared
        else:
            assert scales is None and rows.dtype == x.dtype
        output = np.empty_like(x)
        kernel.finalize(output, array_of("numpy", layer(numpy_of(rows), got_weights, got_ids, mine), "bfloat16"), got_weights, got_ids,
                        False, NoOP())
        assert (numpy_of(output) == layer(numpy_of(x), weights, ids)).all()
    manager.destroy()


@pytest.mark.parametrize("name", STANDARD)
def test_quantised_by_the_engine(ranks, name):  # noqa: F811
    ranks.run(quantised_by_the_engine, name)


def batched_rows_as_experts_want_them(rank, size, store, name, way):
    """Experts that are somewhere else than their number says; rows quantised on the way, or after; packed scales."""
    engine, group = engine_of(rank, size, store, nixl_dispatch={"fp8": "fp8", "packed": "ue8m0"}.get(way, ""))
    placed = np.array([3, 0, 6, 1, 7, 4, 2, 5])  # where expert 0, 1, ... is
    logical = np.argsort(placed)

    def after(rows, config):
        assert config == "config"
        return rows, "scales"

    more = dict(quantize=after) if way == "after" else dict(use_fp8_dispatch=way != "as they are")
    manager, kernel = kernel_of(name, group, size, global_to_physical=placed, **more)

    class PackedExperts:
        def supports_packed_ue8m0_act_scales(self):
            return way == "packed"

    kernel.post_init_setup(PackedExperts())
    x, weights, ids = given(rank, "bfloat16")
    rows, scales, meta, _, _ = kernel.prepare(x, weights, ids, EXPERTS, None, False, "config")
    assert (scales == "scales") if way == "after" else (scales is None) == (way == "as they are")
    if way in ("fp8", "packed"):
        assert rows.dtype.name == "float8_e4m3fn" and scales.dtype == (np.int32 if way == "packed" else np.float32)
    results = np.full(rows.shape, np.nan, np.float32)
    for local, physical in enumerate(owned(rank, size)):
        number, count = logical[physical], meta.expert_num_tokens[local]
        came = [sx[t] for sx, _, si in (tokens_of(r, COUNTS[r]) for r in range(size)) for t in range(len(sx)) if number in si[t]]
        assert count == len(came)
        results[local, :count] = expert(number, np.array(came).reshape(-1, HIDDEN))
    output = np.empty_like(x)
    kernel.finalize(output, array_of("numpy", results, "bfloat16"), weights, ids, False, Delegate())
    assert (numpy_of(output) == layer(numpy_of(x), weights, ids)).all()
    if name == "nixl":
        other = "ue8m0" if way == "fp8" else "fp8"
        raises(ValueError, "the buffer was made for .*: the engine's nixl_dispatch says which", kernel.buffer.dispatch, x, ids, 16, EXPERTS,
               use_fp8=True, round_scale=other == "ue8m0", use_ue8m0=other == "ue8m0")
        raises(ValueError, "num_experts is 9, the buffer was made for 8", kernel.buffer.dispatch, x, ids, 16, 9,
               use_fp8=way in ("fp8", "packed"), round_scale=way == "packed", use_ue8m0=way == "packed")
    manager.destroy()


@pytest.mark.parametrize("way", ["as they are", "fp8", "packed", "after"])
@pytest.mark.parametrize("name", [kernel for kernel in KERNELS if kernel not in STANDARD])
def test_batched_rows_as_experts_want_them(ranks, name, way):  # noqa: F811
    ranks.run(batched_rows_as_experts_want_them, name, way)


def properties(rank, size, store, name):
    """As the contract's table has them."""
    engine, group = engine_of(rank, size, store)
    manager, kernel = kernel_of(name, group, size)
    batched = name in BATCHED
    assert kernel.activation_format.name == ("BatchedExperts" if batched else "Standard")
    dtype = {"ht": "int64", "ll": "int64", "nixl": "int64", "one_sided": "int32"}.get(name)
    assert kernel.topk_indices_dtype() == (dtype and np.dtype(dtype))
    assert kernel.max_num_tokens_per_rank() == (16 if batched else None) and kernel.num_dispatchers() == size
    assert kernel.output_is_reduced() is (name != "agrs") and kernel.supports_async() is (batched or name == "ht")
    assert kernel.maybe_roundup_layer_hidden_size(2880) == 2880
    if not kernel.supports_async():
        raises(NotImplementedError, "has no prepare_async", kernel.prepare_async, None, None, None, 8, None, False)
        raises(NotImplementedError, "has no finalize_async", kernel.finalize_async, None, None, None, None, False, None)
    if batched:
        x, weights, ids = given(rank, "bfloat16")
        raises(NotImplementedError, "defer_input_quant is for Standard rows", kernel.prepare, x, weights, ids, EXPERTS, None, False, None,
               True)
        raises(ValueError, "must be TopKWeightAndReduceDelegate", kernel.finalize, x, x, weights, ids, False, None)
    manager.destroy()


@pytest.mark.parametrize("name", KERNELS)
def test_properties(ranks, name):  # noqa: F811
    ranks.run(properties, name)
