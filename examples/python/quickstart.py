"""Two ranks, threads of this process, send each other tokens and get them back through their experts. Python alone is needed.

    python examples/python/quickstart.py

Expert e multiplies a token by e + 1, so what must come back is known. The last line is "PASS: ..." or an error.
"""

from concurrent.futures import ThreadPoolExecutor

import a2a

RANKS, EXPERTS, TOKENS, TOPK, HIDDEN = 2, 4, 3, 2, 8


def run_rank(rank: int, group: a2a.UniqueId) -> None:
    # Once: this rank joins the group, and learns which experts are its own.
    config = a2a.Config(
        rank=rank, num_ranks=RANKS, unique_id=group, backend="flashinfer_nvlink_one_sided", num_experts=EXPERTS, max_topk=TOPK,
        max_hidden=HIDDEN, max_tokens=TOKENS, token_dtype="float32", setup_timeout_ms=20000, first_step_timeout_ms=20000,
    )
    with a2a.Comm(config) as comm, comm.routing() as routing:
        mine = range(comm.info.first_expert, comm.info.first_expert + comm.info.num_local_experts)

        # For every layer: this rank's tokens, of which token t goes to experts t and 3 - t with weights 1/4 and 3/4.
        tokens = a2a.from_list([[10.0 * rank + t + 1] * HIDDEN for t in range(TOKENS)], "float32")
        ids = a2a.from_list([[t, 3 - t] for t in range(TOKENS)], "int32")
        weights = a2a.from_list([[0.25, 0.75]] * TOKENS, "float32")
        received = comm.dispatch(routing, tokens, ids, weights)

        # What came is [ranks, tokens of a rank, ...], without a copy: np.from_dlpack(received.tokens), or torch's, sees the same
        # memory. The experts of this rank write their weighted sum of each row where combine reads it; other rows have ids -1.
        results = comm.combine_buffer(routing)
        rows, sums = received.tokens.memoryview(), results.memoryview()
        row_ids, row_weights = received.topk_ids.tolist(), received.topk_weights.tolist()
        for source in range(RANKS):
            for t in range(TOKENS):
                scale = sum(w * (e + 1) for e, w in zip(row_ids[source][t], row_weights[source][t]) if e in mine)
                for h in range(HIDDEN):
                    sums[source, t, h] = scale * rows[source, t, h]
        back = comm.combine(routing, results)

    wanted = [[(0.25 * (t + 1) + 0.75 * (4 - t)) * (10 * rank + t + 1)] * HIDDEN for t in range(TOKENS)]
    assert back.tolist() == wanted, f"rank {rank}: {back.tolist()}, not {wanted}"


group = a2a.UniqueId.create()
with ThreadPoolExecutor(RANKS) as threads:
    for done in [threads.submit(run_rank, rank, group) for rank in range(RANKS)]:
        done.result()
print(f"PASS: {RANKS} ranks, {TOKENS} tokens each, liba2a {a2a.version()}")
