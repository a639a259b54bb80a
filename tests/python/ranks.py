"""One rank of a small layer, as a thread or a process runs it, and the same layer by numpy alone.

Expert e gives (e + 1) * token + e. Everything follows from the rank's number, so the reference needs no exchange.
"""

from types import SimpleNamespace

import a2a
import numpy as np

EXPERTS, TOPK, HIDDEN = 10, 4, 48
# Every backend with every layout that it offers.
PAIRS = [
    ("allgather_reducescatter", "gathered"),
    ("flashinfer_nvlink_one_sided", "rank_major"),
    ("flashinfer_nvlink_two_sided", "flat"),
    ("deepep_high_throughput", "flat"),
    ("deepep_high_throughput", "expert_contiguous"),
    ("deepep_low_latency", "expert_padded"),
]
ALIGNMENT = 8  # of expert_contiguous


def tokens_of(rank, count, dtype, hidden=HIDDEN):
    """A rank's tokens, ids (with -1 and a duplicate) and weights."""
    random = np.random.default_rng(100 + rank)
    x = random.standard_normal((count, hidden)).astype(dtype)
    ids = np.array([random.permutation(EXPERTS)[:TOPK] for _ in range(count)], np.int32).reshape(count, TOPK)
    ids[1::5, 2] = -1
    ids[2::5, 3] = ids[2::5, 0]
    return x, ids, random.random((count, TOPK), np.float32)


def owner_of(expert, ranks):
    """Consecutive blocks; the first ranks own one more."""
    return [r for r in range(ranks) for _ in range(EXPERTS // ranks + (r < EXPERTS % ranks))][expert]


def expert(number, x):
    """What an expert makes of rows, in float32."""
    number = np.float32(number)
    return (number + 1) * x.astype(np.float32) + number


def experts(x, ids, weights, mine):
    """The weighted sum of a row over the experts that are `mine`, in float32, k ascending."""
    result = np.zeros(x.shape, np.float32)
    for k in range(TOPK):
        for row in range(len(x)):
            if ids[row, k] >= 0 and mine(ids[row, k]):
                result[row] += weights[row, k] * expert(ids[row, k], x[row])
    return result


def is_by_expert(layout):
    return layout.startswith("expert")


def alone(x, ids, weights, ranks, layout, kept=lambda token, expert: True):
    """What combine must give: the ranks' partial sums added in rank order, or the experts' results in the order of k.
    A (token, expert) pair that is not `kept` is left out."""
    ids = np.array([[e if e >= 0 and kept(t, e) else -1 for e in row] for t, row in enumerate(ids)], np.int32)
    ids = ids.reshape(-1, TOPK)
    if is_by_expert(layout):
        return experts(x, ids, weights, lambda e: True)
    result = np.zeros(x.shape, np.float32)
    for r in range(ranks):
        result += experts(x, ids, weights, lambda e: owner_of(e, ranks) == r)
    return result


# What numpy has not goes as its bits.
BITS = {a2a.bfloat16: a2a.uint16, a2a.float8_e4m3fn: a2a.uint8}


def array_of(tensor):
    """A tensor as a numpy array on the same memory."""
    return np.from_dlpack(tensor.view(BITS.get(tensor.dtype, tensor.dtype)))


def flat_rows(tensor):
    """A view of rows, which is compact, with one dimension for all rows."""
    array = array_of(tensor)
    assert array.flags.c_contiguous
    return array.reshape(-1, array.shape[-1])


def config_of(rank, ranks, group, backend, max_tokens, dtype, **fields):
    return a2a.Config(**dict(
        rank=rank, num_ranks=ranks, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=max_tokens,
        token_dtype=dtype, combine_dtype="float32", backend=backend, unique_id=group, setup_timeout_ms=30000,
        first_step_timeout_ms=30000, timeout_ms=30000,
    ) | fields)


class Rank:
    """A comm and a routing. A rank that fails leaves the `with` block: the others learn of it at once."""

    def __init__(self, rank, group, backend, layout, counts, dtype="float32", **fields):
        self.layout = layout
        fields |= dict(layout=layout)
        if layout == "expert_contiguous":
            fields |= dict(expert_alignment=ALIGNMENT)
        self.config = config_of(rank, len(counts), group, backend, max(counts), dtype, **fields)
        self.comm = a2a.Comm(self.config)
        self.info, self.routing = self.comm.info, self.comm.routing()
        # NVLINK_TWO_SIDED keeps no rows: they go to arrays of ours.
        self.keeps_rows = self.info.backend != a2a.Backend.NVLINK_TWO_SIDED

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.routing.close()
        self.comm.close()

    def mine(self, expert):
        return 0 <= expert - self.info.first_expert < self.info.num_local_experts

    def row_outputs(self, hidden, token_dtype, scale_columns):
        """Arrays of ours for rows, full of what must be overwritten, where the backend keeps none."""
        if self.keeps_rows:
            return {}
        rows = self.info.row_capacity
        scale_dtype = "int32" if self.config.quant == a2a.Quant.FP8_UE8M0_SCALES else "float32"
        scales = np.full((rows, scale_columns), 77, scale_dtype)
        if self.config.scale_layout == a2a.ScaleLayout.COLUMN:
            scales = np.full((scale_columns, -(-rows // 4) * 4), 77, scale_dtype).T[:rows]
        tokens = np.full((rows, hidden), 77, token_dtype)
        outputs = dict(
            tokens=a2a.as_tensor(tokens, "float8_e4m3fn") if scale_columns else tokens,
            topk_weights=np.full((rows, TOPK), np.nan, np.float32),
            row_source=np.full((rows, 2), 77, np.int32),
            topk_ids=np.full((rows, TOPK), 77, np.int32),
        )
        return outputs | (dict(scales=scales) if scale_columns else {})

    def dispatch(self, x, ids=None, weights=None, flags=0, scale_columns=0, x_type=None, scales=None, status=None):
        """A whole dispatch; returns what came, as arrays. `x_type` says what an array of plain integers holds."""
        out = self.row_outputs(x.shape[1], np.uint8 if scale_columns else x.dtype, scale_columns)
        out |= {} if status is None else dict(status=status)
        received = self.comm.dispatch(self.routing, a2a.as_tensor(x, x_type), ids, weights, scales, flags=flags, out=out)
        names = [name for name in a2a.OUTPUTS if hasattr(received, name)]
        got = SimpleNamespace(**{name: array_of(getattr(received, name)) for name in names}, received=received)
        got.shape = got.tokens.shape[:-1]  # of the rows: one dimension, or two
        got.tokens = flat_rows(received.tokens)
        got.row_source = flat_rows(received.row_source)
        if is_by_expert(self.layout):
            got.topk_weights = got.topk_weights.reshape(-1)
        else:
            got.topk_ids, got.topk_weights = flat_rows(received.topk_ids), flat_rows(received.topk_weights)
        return got

    def experts_of(self, got):
        """(expert, its rows), for each expert of this rank: EXPERT_* layouts."""
        for local, (start, count) in enumerate(zip(got.expert_offsets, got.expert_counts)):
            yield self.info.first_expert + local, slice(start, start + count)

    def compute(self, got, tokens):
        """The experts' rows as combine takes them; NaN where combine must not look."""
        if not is_by_expert(self.layout):
            results = experts(tokens, got.topk_ids, got.topk_weights, self.mine)
            results[[not any(map(self.mine, ids)) for ids in got.topk_ids]] = np.nan
            return results
        results = np.full(tokens.shape, np.nan, np.float32)
        for number, rows in self.experts_of(got):
            results[rows] = expert(number, tokens[rows])
        return results

    def combine(self, got, results, tokens, row_weights=None, weights_out=None, status=None):
        """A whole combine, zero-copy where there is a buffer; returns the sums of this rank's `tokens` tokens."""
        y = np.full((tokens, results.shape[-1]), np.nan, np.float32)
        sent = results
        if self.keeps_rows:
            sent = self.comm.combine_buffer(self.routing)
            flat_rows(sent)[...] = results
        if row_weights is not None:
            row_weights = row_weights.reshape(*got.shape, *row_weights.shape[1:])
        return self.comm.combine(self.routing, sent, y, row_weights=row_weights, weights_out=weights_out, status=status)


def run_rank(rank, group, backend, layout, counts, dtype, steps=3):
    """A rank's whole life; returns what each step's combine gave."""
    x, ids, weights = tokens_of(rank, counts[rank], dtype)
    with Rank(rank, group, backend, layout, counts, dtype) as me:
        outcome = []
        for _ in range(steps):
            got = me.dispatch(x, ids, weights)
            outcome.append(me.combine(got, me.compute(got, got.tokens), len(x)))
        return outcome


def together(pool, count, function, *arguments):
    """Runs a function as every rank of a new group; returns what each gave."""
    group = bytes(a2a.UniqueId.create())
    running = [pool.submit(function, rank, group, *arguments) for rank in range(count)]
    failures = [repr(error) for error in (future.exception(timeout=120) for future in running) if error]
    # A rank that fails takes the others' steps with it: the cause comes before what it caused.
    failures.sort(key=lambda text: "PEER_LOST" in text)
    assert not failures, "\n".join(failures)
    return [future.result() for future in running]
