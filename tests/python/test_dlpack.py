"""A numpy array's own DLTensor goes through as it is: as input, and as an output that the caller owns."""

import ctypes

import a2a_ctypes as a2a
import numpy as np
import pytest

import ranks

TOKENS, MAX_TOKENS = 9, 12


@pytest.fixture(params=["allgather_reducescatter", "flashinfer_nvlink_one_sided", "deepep_high_throughput"])
def alone(lib, request):
    """A comm of one rank, its routing, and the shape of a step's rows."""
    comm, routing = ctypes.c_void_p(), ctypes.c_void_p()
    lib.a2a_create(ranks.config_of(lib, 0, 1, bytes(128), request.param, MAX_TOKENS, "float32"), comm)
    lib.a2a_routing_create(comm, 0, routing)
    yield comm, routing, (1, MAX_TOKENS) if "one_sided" in request.param else (MAX_TOKENS,)
    lib.a2a_routing_destroy(routing)
    lib.a2a_destroy(comm)


def dlpack(array):
    return a2a.Tensor.from_dlpack(array)


def inputs(ids_dtype):
    x, ids, weights = ranks.tokens_of(0, TOKENS, "float32")
    return x, ids.astype(ids_dtype), weights


def test_numpy_describes_itself_as_the_header_says():
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    tensor = dlpack(array)
    assert (tensor.data, tensor.byte_offset, tensor.sizes()) == (array.ctypes.data, 0, [2, 3, 4])
    assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (2, 16, 1)
    assert (tensor.device.device_type, tensor.device.device_id) == (a2a.DEVICE_CPU, 0)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_caller_owned_outputs(lib, alone, ids_dtype):
    comm, routing, rows = alone
    x, ids, weights = inputs(ids_dtype)
    tokens = np.full((*rows, ranks.HIDDEN), np.nan, np.float32)
    row_ids = np.full((*rows, ranks.TOPK), 77, ids_dtype)
    row_weights = np.full((*rows, ranks.TOPK), np.nan, np.float32)
    source = np.full((*rows, 2), 77, np.int32)
    expert_counts, rank_counts = np.full(ranks.EXPERTS, 77, np.int32), np.full(1, 77, np.int32)
    stats, status = np.full(ranks.EXPERTS, 1000, np.int64), np.full(5, 77, np.int32)
    out = a2a.DispatchOut(
        tokens=dlpack(tokens), topk_ids=dlpack(row_ids), topk_weights=dlpack(row_weights), row_source=dlpack(source),
        expert_counts=dlpack(expert_counts), rank_counts=dlpack(rank_counts), expert_stats=dlpack(stats),
        status=dlpack(status),
    )
    sent = a2a.DispatchIn(tokens=dlpack(x), topk_ids=dlpack(ids), topk_weights=dlpack(weights),
                          flags=a2a.DISPATCH_HOST_COUNTS | a2a.DISPATCH_ZERO_PADDING)
    lib.a2a_dispatch(comm, routing, sent, out, None)

    assert out.num_rows == TOKENS
    flat = [array.reshape(MAX_TOKENS, -1) for array in (tokens, row_ids, row_weights, source)]
    assert (flat[0][:TOKENS] == x).all()
    assert (flat[1][:TOKENS] == ids).all()
    assert (flat[2][:TOKENS] == weights).all()
    assert (flat[3][:TOKENS] == [[0, t] for t in range(TOKENS)]).all()
    assert (flat[0][TOKENS:] == 0).all()  # past the counts
    assert (flat[1][TOKENS:] == -1).all()
    assert (flat[2][TOKENS:] == 0).all()
    assert (flat[3][TOKENS:] == -1).all()
    distinct = [sum(e in row for row in ids) for e in range(ranks.EXPERTS)]
    assert expert_counts.tolist() == distinct
    assert stats.tolist() == [1000 + n for n in distinct]
    assert rank_counts.tolist() == [TOKENS]
    assert status.tolist()[:3] == [0, 0, 0] and status[4] == 0

    # The experts' output is the caller's too: it is staged.
    y = np.full((TOKENS, ranks.HIDDEN), np.nan, np.float32)
    results = ranks.experts(*flat[:3], lambda e: True).reshape(tokens.shape)
    lib.a2a_combine(comm, routing, a2a.CombineIn(tokens=dlpack(results)), a2a.CombineOut(tokens=dlpack(y)), None)
    assert y.tobytes() == ranks.alone(x, ids, weights, 1, "flat").tobytes()


def test_strided_rows(lib, alone):
    """Rows that are slices of wider ones, on the way in and on the way out."""
    comm, routing, _ = alone
    x, ids, weights = inputs("int32")
    wide_x = np.full((TOKENS, ranks.HIDDEN + 16), np.nan, np.float32)
    wide_ids = np.full((TOKENS, ranks.TOPK + 3), 10**6, np.int32)
    wide_y = np.full((TOKENS, ranks.HIDDEN + 32), 5, np.float32)
    wide_x[:, : ranks.HIDDEN], wide_ids[:, : ranks.TOPK] = x, ids
    rows, row_ids, row_weights = a2a.Tensor(), a2a.Tensor(), a2a.Tensor()
    lib.a2a_dispatch(
        comm, routing,
        a2a.DispatchIn(tokens=dlpack(wide_x[:, : ranks.HIDDEN]), topk_ids=dlpack(wide_ids[:, : ranks.TOPK]),
                       topk_weights=dlpack(weights)),
        a2a.DispatchOut(tokens=rows, topk_ids=row_ids, topk_weights=row_weights), None,
    )
    got = [ranks.flat_rows(view) for view in (rows, row_ids, row_weights)]
    assert (got[0][:TOKENS] == x).all() and (got[1][:TOKENS] == ids).all()
    results = ranks.experts(*got, lambda e: True).reshape(rows.sizes())
    lib.a2a_combine(comm, routing, a2a.CombineIn(tokens=dlpack(results)),
                    a2a.CombineOut(tokens=dlpack(wide_y[:, : ranks.HIDDEN])), None)
    assert wide_y[:, : ranks.HIDDEN].tobytes() == ranks.alone(x, ids, weights, 1, "flat").tobytes()
    assert (wide_y[:, ranks.HIDDEN :] == 5).all()


def test_wrong_arrays_are_refused(lib, alone):
    comm, routing, _ = alone
    x, ids, weights = inputs("int32")
    transposed = np.zeros((ranks.HIDDEN, TOKENS), np.float32).T
    for wrong, word in [
        (dict(tokens=dlpack(transposed)), "tokens"),
        (dict(tokens=dlpack(x[0])), "tokens"),
        (dict(topk_ids=dlpack(ids.astype(np.float32))), "topk_ids"),
        (dict(topk_weights=dlpack(weights.astype(np.float64))), "topk_weights"),
    ]:
        right = dict(tokens=dlpack(x), topk_ids=dlpack(ids), topk_weights=dlpack(weights))
        with pytest.raises(a2a.Error, match=word) as refusal:
            lib.a2a_dispatch(comm, routing, a2a.DispatchIn(**(right | wrong)), a2a.DispatchOut(), None)
        assert refusal.value.status == a2a.INVALID_ARGUMENT
