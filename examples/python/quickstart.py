"""Two ranks, threads of this process, send each other tokens and get them back through their experts. ctypes only.

    python examples/python/quickstart.py

Expert e multiplies a token by e + 1, so what must come back is known. The last line is "PASS: ..." or an error.
"""

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int32, c_void_p

import a2a_ctypes as a2a

RANKS, EXPERTS, TOKENS, TOPK, HIDDEN = 2, 4, 3, 2, 8
Row, Ids, Weights = c_float * HIDDEN, c_int32 * TOPK, c_float * TOPK
lib = a2a.load()


def run_rank(rank, group):
    # Once: the comm, a routing, and what this rank owns.
    config = a2a.Config(
        rank=rank, num_ranks=RANKS, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=TOKENS,
        token_dtype=a2a.DTYPE_F32, backend=lib.a2a_backend_from_name(b"flashinfer_nvlink_one_sided"),
        unique_id=group, setup_timeout_ms=20000, first_step_timeout_ms=20000, timeout_ms=20000,
    )
    comm, routing, info = c_void_p(), c_void_p(), a2a.Info()
    lib.a2a_create(config, comm)
    lib.a2a_routing_create(comm, 0, routing)
    lib.a2a_get_info(comm, info)

    # This rank's tokens: token t goes to experts t and 3 - t, with weights 1/4 and 3/4.
    tokens = (Row * TOKENS)(*(Row(*[10 * rank + t + 1] * HIDDEN) for t in range(TOKENS)))
    ids = (Ids * TOKENS)(*(Ids(t, 3 - t) for t in range(TOKENS)))
    weights = (Weights * TOKENS)(*[Weights(0.25, 0.75)] * TOKENS)
    sent = a2a.DispatchIn(
        tokens=a2a.Tensor.of(tokens, a2a.FLOAT32, TOKENS, HIDDEN),
        topk_ids=a2a.Tensor.of(ids, a2a.INT32, TOKENS, TOPK),
        topk_weights=a2a.Tensor.of(weights, a2a.FLOAT32, TOKENS, TOPK),
    )

    # Outputs without data become views: [ranks, tokens of a rank, ...]; a row without a token has ids -1.
    rows, row_ids, row_weights, results = (a2a.Tensor() for _ in range(4))
    received = a2a.DispatchOut(tokens=rows, topk_ids=row_ids, topk_weights=row_weights)
    lib.a2a_dispatch(comm, routing, sent, received, None)

    # The experts of this rank write their weighted sum where combine reads it.
    lib.a2a_combine_buffer(comm, routing, results)
    for place in ((source, t) for source in range(RANKS) for t in range(TOKENS)):
        chosen = zip(Ids.from_address(row_ids.address(*place)), Weights.from_address(row_weights.address(*place)))
        ours = [(e, w) for e, w in chosen if 0 <= e - info.first_expert < info.num_local_experts]
        row = Row.from_address(rows.address(*place))
        Row.from_address(results.address(*place))[:] = [sum(w * (e + 1) * x for e, w in ours) for x in row]

    back = (Row * TOKENS)()
    out = a2a.CombineOut(tokens=a2a.Tensor.of(back, a2a.FLOAT32, TOKENS, HIDDEN))
    lib.a2a_combine(comm, routing, a2a.CombineIn(tokens=results), out, None)
    lib.a2a_routing_destroy(routing)
    lib.a2a_destroy(comm)

    wanted = [[(0.25 * (t + 1) + 0.75 * (4 - t)) * x for x in tokens[t]] for t in range(TOKENS)]
    assert [list(row) for row in back] == wanted, f"rank {rank}: {[list(row) for row in back]}, not {wanted}"


group = a2a.unique_id(lib)
with ThreadPoolExecutor(RANKS) as threads:
    for done in [threads.submit(run_rank, rank, group) for rank in range(RANKS)]:
        done.result()
print(f"PASS: {RANKS} ranks, {TOKENS} tokens each, liba2a {lib.a2a_version().decode()}")
