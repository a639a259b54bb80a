"""One rank of a small layer, as a thread or a process runs it, and the same layer by numpy alone.

Expert e gives (e + 1) * token + e. Everything follows from the rank's number, so the reference needs no exchange.
"""

import ctypes

import a2a_ctypes as a2a
import numpy as np

EXPERTS, TOPK, HIDDEN = 10, 4, 48
DTYPES = {"float16": a2a.DTYPE_F16, "float32": a2a.DTYPE_F32}


def tokens_of(rank, count, dtype):
    """A rank's tokens, ids (with -1 and a duplicate) and weights."""
    random = np.random.default_rng(100 + rank)
    x = random.standard_normal((count, HIDDEN)).astype(dtype)
    ids = np.array([random.permutation(EXPERTS)[:TOPK] for _ in range(count)], np.int32).reshape(count, TOPK)
    ids[1::5, 2] = -1
    ids[2::5, 3] = ids[2::5, 0]
    return x, ids, random.random((count, TOPK), np.float32)


def owner_of(expert, ranks):
    """Consecutive blocks; the first ranks own one more."""
    return [r for r in range(ranks) for _ in range(EXPERTS // ranks + (r < EXPERTS % ranks))][expert]


def experts(x, ids, weights, mine):
    """The weighted sum of a row over the experts that are `mine`, in float32, k ascending."""
    x = x.astype(np.float32)
    result = np.zeros_like(x)
    for k in range(TOPK):
        expert = ids[:, k, None].astype(np.float32)
        chosen = np.array([e >= 0 and mine(e) for e in ids[:, k]], bool)
        result[chosen] += (weights[:, k, None] * ((expert + 1) * x + expert))[chosen]
    return result


def alone(rank, ranks, count, dtype):
    """What combine must give: the ranks' partial sums, added in rank order."""
    x, ids, weights = tokens_of(rank, count, dtype)
    result = np.zeros(x.shape, np.float32)
    for r in range(ranks):
        result += experts(x, ids, weights, lambda e: owner_of(e, ranks) == r)
    return result


def flat_rows(tensor, dtype):
    """A library's view, which is compact, as a numpy array of rows."""
    sizes = tensor.sizes()
    assert tensor.steps() == [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    bytes_ = int(np.prod(sizes)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * bytes_).from_address(tensor.address())
    return np.frombuffer(memory, dtype).reshape(-1, sizes[-1])


def config_of(lib, rank, ranks, group, backend, max_tokens, dtype):
    return a2a.Config(
        rank=rank, num_ranks=ranks, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=max_tokens,
        token_dtype=DTYPES[dtype], combine_dtype=a2a.DTYPE_F32, backend=lib.a2a_backend_from_name(backend.encode()),
        unique_id=a2a.UniqueId.from_buffer_copy(group), setup_timeout_ms=30000, first_step_timeout_ms=30000,
        timeout_ms=30000,
    )


def run_rank(rank, group, backend, counts, dtype, steps=3):
    """A rank's whole life; returns what each step's combine gave."""
    lib = a2a.load()
    comm, routing, info = ctypes.c_void_p(), ctypes.c_void_p(), a2a.Info()
    lib.a2a_create(config_of(lib, rank, len(counts), group, backend, max(counts), dtype), comm)
    try:
        lib.a2a_routing_create(comm, 0, routing)
        lib.a2a_get_info(comm, info)
        tokens = tokens_of(rank, counts[rank], dtype)
        return [step(lib, comm, routing, info, *tokens) for _ in range(steps)]
    finally:  # a rank that fails leaves: the others learn of it at once
        lib.a2a_routing_destroy(routing)
        lib.a2a_destroy(comm)


def step(lib, comm, routing, info, x, ids, weights):
    """Dispatch, the experts, combine."""
    rows, row_ids, row_weights, results = (a2a.Tensor() for _ in range(4))
    sent = a2a.DispatchIn(
        tokens=a2a.Tensor.from_dlpack(x),
        topk_ids=a2a.Tensor.from_dlpack(ids),
        topk_weights=a2a.Tensor.from_dlpack(weights),
    )
    received = a2a.DispatchOut(tokens=rows, topk_ids=row_ids, topk_weights=row_weights)
    lib.a2a_dispatch(comm, routing, sent, received, None)

    lib.a2a_combine_buffer(comm, routing, results)
    flat = [flat_rows(*view) for view in ((rows, x.dtype), (row_ids, np.int32), (row_weights, np.float32))]
    mine = range(info.first_expert, info.first_expert + info.num_local_experts)
    flat_rows(results, np.float32)[...] = experts(*flat, lambda e: e in mine)

    y = np.full(x.shape, np.nan, np.float32)
    out = a2a.CombineOut(tokens=a2a.Tensor.from_dlpack(y))
    lib.a2a_combine(comm, routing, a2a.CombineIn(tokens=results), out, None)
    return y
