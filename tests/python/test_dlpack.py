"""A numpy array's own DLTensor goes through as it is: as input, and as an output that the caller owns."""

import a2a
import numpy as np
import pytest

import ranks

TOKENS, MAX_TOKENS = 9, 12


@pytest.fixture(params=["allgather_reducescatter", "flashinfer_nvlink_one_sided", "deepep_high_throughput"])
def alone(request):
    """A comm of one rank, its routing, and the shape of a step's rows."""
    with a2a.Comm(ranks.config_of(0, 1, bytes(128), request.param, MAX_TOKENS, "float32")) as comm, comm.routing() as routing:
        yield comm, routing, (1, MAX_TOKENS) if "one_sided" in request.param else (MAX_TOKENS,)


def inputs(ids_dtype):
    x, ids, weights = ranks.tokens_of(0, TOKENS, "float32")
    return x, ids.astype(ids_dtype), weights


def test_numpy_describes_itself_as_the_header_says():
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    tensor = a2a.as_tensor(array)
    assert (tensor.address, tensor.shape, tensor.strides) == (array.ctypes.data, (2, 3, 4), (12, 4, 1))
    assert tensor.dtype == (2, 16, 1) and tensor.dtype == a2a.float16
    assert tensor.device == (a2a.Device.CPU, 0)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_caller_owned_outputs(alone, ids_dtype):
    comm, routing, rows = alone
    x, ids, weights = inputs(ids_dtype)
    out = dict(
        tokens=np.full((*rows, ranks.HIDDEN), np.nan, np.float32),
        topk_ids=np.full((*rows, ranks.TOPK), 77, ids_dtype),
        topk_weights=np.full((*rows, ranks.TOPK), np.nan, np.float32),
        row_source=np.full((*rows, 2), 77, np.int32),
        expert_counts=np.full(ranks.EXPERTS, 77, np.int32), rank_counts=np.full(1, 77, np.int32),
        expert_stats=np.full(ranks.EXPERTS, 1000, np.int64), status=np.full(5, 77, np.int32),
    )
    flags = a2a.DispatchFlag.HOST_COUNTS | a2a.DispatchFlag.ZERO_PADDING
    received = comm.dispatch(routing, x, ids, weights, flags=flags, out=out)

    assert received.num_rows == TOKENS
    assert received.topk_ids.address == out["topk_ids"].ctypes.data
    flat = [out[name].reshape(MAX_TOKENS, -1) for name in ("tokens", "topk_ids", "topk_weights", "row_source")]
    assert (flat[0][:TOKENS] == x).all()
    assert (flat[1][:TOKENS] == ids).all()
    assert (flat[2][:TOKENS] == weights).all()
    assert (flat[3][:TOKENS] == [[0, t] for t in range(TOKENS)]).all()
    assert (flat[0][TOKENS:] == 0).all()  # past the counts
    assert (flat[1][TOKENS:] == -1).all()
    assert (flat[2][TOKENS:] == 0).all()
    assert (flat[3][TOKENS:] == -1).all()
    distinct = [sum(e in row for row in ids) for e in range(ranks.EXPERTS)]
    assert out["expert_counts"].tolist() == distinct
    assert out["expert_stats"].tolist() == [1000 + n for n in distinct]
    assert out["rank_counts"].tolist() == [TOKENS]
    assert out["status"].tolist()[:3] == [0, 0, 0] and out["status"][4] == 0

    # The experts' output is the caller's too: it is staged.
    y = np.full((TOKENS, ranks.HIDDEN), np.nan, np.float32)
    results = ranks.experts(*flat[:3], lambda e: True).reshape(out["tokens"].shape)
    assert comm.combine(routing, results, y) is y
    assert y.tobytes() == ranks.alone(x, ids, weights, 1, "flat").tobytes()


def test_strided_rows(alone):
    """Rows that are slices of wider ones, on the way in and on the way out."""
    comm, routing, _ = alone
    x, ids, weights = inputs("int32")
    wide_x = np.full((TOKENS, ranks.HIDDEN + 16), np.nan, np.float32)
    wide_ids = np.full((TOKENS, ranks.TOPK + 3), 10**6, np.int32)
    wide_y = np.full((TOKENS, ranks.HIDDEN + 32), 5, np.float32)
    wide_x[:, : ranks.HIDDEN], wide_ids[:, : ranks.TOPK] = x, ids
    received = comm.dispatch(routing, wide_x[:, : ranks.HIDDEN], wide_ids[:, : ranks.TOPK], weights)
    got = [ranks.flat_rows(view) for view in (received.tokens, received.topk_ids, received.topk_weights)]
    assert (got[0][:TOKENS] == x).all() and (got[1][:TOKENS] == ids).all()
    results = ranks.experts(*got, lambda e: True).reshape(received.tokens.shape)
    comm.combine(routing, results, wide_y[:, : ranks.HIDDEN])
    assert wide_y[:, : ranks.HIDDEN].tobytes() == ranks.alone(x, ids, weights, 1, "flat").tobytes()
    assert (wide_y[:, ranks.HIDDEN :] == 5).all()


def test_wrong_arrays_are_refused(alone):
    comm, routing, _ = alone
    x, ids, weights = inputs("int32")
    transposed = np.zeros((ranks.HIDDEN, TOKENS), np.float32).T
    for wrong, word in [
        (dict(tokens=transposed), "tokens"),
        (dict(tokens=x[0]), "tokens"),
        (dict(topk_ids=ids.astype(np.float32)), "topk_ids"),
        (dict(topk_weights=weights.astype(np.float64)), "topk_weights"),
    ]:
        with pytest.raises(a2a.InvalidArgumentError, match=word):
            comm.dispatch(routing, **(dict(tokens=x, topk_ids=ids, topk_weights=weights) | wrong))
