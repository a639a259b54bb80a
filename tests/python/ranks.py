"""One rank of a small layer, as a thread or a process runs it, and the same layer by numpy alone.

Expert e gives (e + 1) * token + e. Everything follows from the rank's number, so the reference needs no exchange.
"""

import ctypes
from types import SimpleNamespace

import a2a_ctypes as a2a
import numpy as np

EXPERTS, TOPK, HIDDEN = 10, 4, 48
DTYPES = {"float16": a2a.DTYPE_F16, "float32": a2a.DTYPE_F32, "bfloat16": a2a.DTYPE_BF16}
LAYOUTS = {
    "gathered": a2a.LAYOUT_GATHERED,
    "rank_major": a2a.LAYOUT_RANK_MAJOR,
    "flat": a2a.LAYOUT_FLAT,
    "expert_padded": a2a.LAYOUT_EXPERT_PADDED,
    "expert_contiguous": a2a.LAYOUT_EXPERT_CONTIGUOUS,
}
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


NUMPY = {(0, 32): "int32", (0, 64): "int64", (1, 8): "uint8", (2, 16): "float16", (2, 32): "float32",
         a2a.BFLOAT16: "uint16", a2a.FLOAT8_E4M3: "uint8"}


def array_of(tensor):
    """A library's view as a numpy array on the same memory."""
    dtype = np.dtype(NUMPY[tensor.dtype.code, tensor.dtype.bits])
    sizes, strides = tensor.sizes(), [step * dtype.itemsize for step in tensor.steps()]
    if 0 in sizes:
        return np.zeros(sizes, dtype)
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides)) + dtype.itemsize
    memory = (ctypes.c_char * span).from_address(tensor.address())
    return np.ndarray(sizes, dtype, memory, strides=strides)


def flat_rows(tensor):
    """A view of rows, which is compact, with one dimension for all rows."""
    array = array_of(tensor)
    assert array.flags.c_contiguous
    return array.reshape(-1, array.shape[-1])


def config_of(lib, rank, ranks, group, backend, max_tokens, dtype, **fields):
    return a2a.Config(**dict(
        rank=rank, num_ranks=ranks, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=max_tokens,
        token_dtype=DTYPES[dtype], combine_dtype=a2a.DTYPE_F32, backend=lib.a2a_backend_from_name(backend.encode()),
        unique_id=a2a.UniqueId.from_buffer_copy(group), setup_timeout_ms=30000, first_step_timeout_ms=30000,
        timeout_ms=30000,
    ) | fields)


class Rank:
    """A comm and a routing. A rank that fails leaves the `with` block: the others learn of it at once."""

    def __init__(self, rank, group, backend, layout, counts, dtype="float32", **fields):
        self.lib = lib = a2a.load()
        self.comm, self.routing, self.info = ctypes.c_void_p(), ctypes.c_void_p(), a2a.Info()
        self.layout = layout
        fields |= dict(layout=LAYOUTS[layout])
        if layout == "expert_contiguous":
            fields |= dict(expert_alignment=ALIGNMENT)
        config = config_of(lib, rank, len(counts), group, backend, max(counts), dtype, **fields)
        lib.a2a_create(config, self.comm)
        lib.a2a_routing_create(self.comm, 0, self.routing)
        lib.a2a_get_info(self.comm, self.info)
        # NVLINK_TWO_SIDED keeps no rows: they go to arrays of ours.
        self.keeps_rows = self.info.backend != a2a.BACKEND_NVLINK_TWO_SIDED
        self.quant, self.scale_layout = config.quant, config.scale_layout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.a2a_routing_destroy(self.routing)
        self.lib.a2a_destroy(self.comm)

    def mine(self, expert):
        return 0 <= expert - self.info.first_expert < self.info.num_local_experts

    def ours(self, array, dtype=None):
        """A row output of ours, kept alive by its tensor."""
        tensor = a2a.Tensor.from_dlpack(array)
        return tensor.typed(dtype) if dtype else tensor

    def row_outputs(self, hidden, token_dtype, scale_columns):
        """The outputs that take rows: views, or arrays of ours full of what must be overwritten."""
        names = ["tokens", "topk_weights", "row_source"]
        names += ["topk_ids"] if self.layout != "expert_padded" else []
        names += ["scales"] if scale_columns else []
        if self.keeps_rows:
            return {name: a2a.Tensor() for name in names}
        rows = self.info.row_capacity
        scale_dtype = "int32" if self.quant == a2a.QUANT_FP8_UE8M0_SCALES else "float32"
        scales = np.full((rows, scale_columns), 77, scale_dtype)
        if self.scale_layout == a2a.SCALES_COLUMN:
            scales = np.full((scale_columns, -(-rows // 4) * 4), 77, scale_dtype).T[:rows]
        outputs = dict(
            tokens=self.ours(np.full((rows, hidden), 77, token_dtype), a2a.FLOAT8_E4M3 if scale_columns else None),
            topk_weights=self.ours(np.full((rows, TOPK), np.nan, np.float32)),
            row_source=self.ours(np.full((rows, 2), 77, np.int32)),
            topk_ids=self.ours(np.full((rows, TOPK), 77, np.int32)),
        )
        return outputs | (dict(scales=self.ours(scales)) if scale_columns else {})

    def dispatch(self, x, ids=None, weights=None, flags=0, scale_columns=0, x_type=None, scales=None, status=None):
        """A whole dispatch; returns what came, as arrays. `x_type` says what an array of plain integers holds."""
        tensors = dict(tokens=self.ours(x, x_type))
        tensors |= {name: self.ours(array)
                    for name, array in (("topk_ids", ids), ("topk_weights", weights), ("scales", scales))
                    if array is not None}
        outputs = self.row_outputs(x.shape[1], np.uint8 if scale_columns else x.dtype, scale_columns)
        outputs |= dict(expert_counts=a2a.Tensor(), rank_counts=a2a.Tensor())
        outputs |= dict(expert_offsets=a2a.Tensor()) if is_by_expert(self.layout) else {}
        outputs |= dict(status=a2a.Tensor() if status is None else self.ours(status))
        self.lib.a2a_dispatch(self.comm, self.routing, a2a.DispatchIn(flags=flags, **tensors),
                              a2a.DispatchOut(**outputs), None)
        got = SimpleNamespace(**{name: array_of(tensor) for name, tensor in outputs.items()})
        got.shape = got.tokens.shape[:-1]  # of the rows: one dimension, or two
        got.tokens = flat_rows(outputs["tokens"])
        got.row_source = flat_rows(outputs["row_source"])
        got.tensors = outputs
        if is_by_expert(self.layout):
            got.topk_weights = got.topk_weights.reshape(-1)
        else:
            got.topk_ids, got.topk_weights = (flat_rows(outputs[name]) for name in ("topk_ids", "topk_weights"))
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
        if self.keeps_rows:
            sent = a2a.Tensor()
            self.lib.a2a_combine_buffer(self.comm, self.routing, sent)
            flat_rows(sent)[...] = results
        else:
            sent = self.ours(results)
        y = np.full((tokens, results.shape[-1]), np.nan, np.float32)
        given, out = dict(tokens=sent), dict(tokens=self.ours(y))
        if row_weights is not None:
            given |= dict(row_weights=self.ours(row_weights.reshape(*got.shape, *row_weights.shape[1:])))
        if weights_out is not None:
            out |= dict(topk_weights=self.ours(weights_out))
        if status is not None:
            out |= dict(status=self.ours(status))
        self.lib.a2a_combine(self.comm, self.routing, a2a.CombineIn(**given), a2a.CombineOut(**out), None)
        return y


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
    group = bytes(a2a.unique_id(a2a.load()))
    running = [pool.submit(function, rank, group, *arguments) for rank in range(count)]
    failures = [repr(error) for error in (future.exception(timeout=120) for future in running) if error]
    # A rank that fails takes the others' steps with it: the cause comes before what it caused.
    failures.sort(key=lambda text: "PEER_LOST" in text)
    assert not failures, "\n".join(failures)
    return [future.result() for future in running]
