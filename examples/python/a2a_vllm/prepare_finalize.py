"""What a modular MoE kernel asks of an all-to-all: prepare and finalize, for each manager, with vLLM's names and shapes.

prepare gives (rows, scales or None, counts or None, topk_ids or None, topk_weights or None): what came from all ranks, for the experts
of this one. finalize writes the sums for this rank's own tokens into `output`. Rows are, by activation_format,

    Standard        [rows, H], a token once; topk_ids [rows, K] are global, -1 in rows that nobody sent (whose values are 0)
    BatchedExperts  [L, R * max_tokens, H], by expert; the first counts[e] of expert e are rows, the rest is undefined; ids and weights
                    stay those of this rank's tokens

and are valid until finalize. Which rows are whose does not depend on the manager, nor do the ids' meaning and filler.

Quantisation before rows travel is the engine's (`quantize`); what mixes rows (a swizzle of scales) happens after (`arrange_scales`).
The batched ones quantise on the way (`use_fp8_dispatch`). Nothing that was given to prepare is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from . import arrays
from .allgather_reducescatter import AgRsAll2AllManager
from .arrays import Dtype, Tensor
from .batched import nothing
from .comms import Handle
from .deepep import HighThroughputBuffer, LowLatencyBuffer
from .flashinfer_nvlink import FlashInferNVLinkOneSidedManager, FlashInferNVLinkTwoSidedManager, Received
from .nixl_ep import NixlBuffer


class FusedMoEActivationFormat(Enum):
    """How prepare's rows lie."""

    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


@dataclass
class ExpertTokensMetadata:
    """[L] int32 each: rows of each expert of this rank, on the device, and on the host where they are known there."""

    expert_num_tokens: Tensor
    expert_num_tokens_cpu: Tensor | None = None


class TopKWeightAndReduceDelegate:
    """The experts leave the weights, and the sum over the top-k, to finalize."""


class TopKWeightAndReduceNoOP:
    """The experts have weighted and summed."""

    def apply(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        return fused_expert_output


PrepareResult = tuple[Tensor, "Tensor | None", "ExpertTokensMetadata | None", "Tensor | None", "Tensor | None"]
Receiver = Callable[[], PrepareResult]
# (a1, quant_config) -> (values, scales by row or None)
Quantize = Callable[[Tensor, Any], "tuple[Tensor, Tensor | None]"]
# (scales by row, quant_config) -> the scales as the experts want them
ArrangeScales = Callable[[Tensor, Any], Tensor]


def delegated(impl: Any) -> bool:
    """Whether impl is TopKWeightAndReduceDelegate, ours or vLLM's."""
    return type(impl).__name__ == "TopKWeightAndReduceDelegate"


class PrepareAndFinalize:
    """What all of them have. A subclass has `_send` and `_combine`, and what its class attributes say."""

    activation_format = FusedMoEActivationFormat.Standard
    _ids_dtype: str | None = None
    _is_reduced = True
    _is_async = False

    def __init__(self, num_dispatchers: int, quantize: Quantize | None = None, arrange_scales: ArrangeScales | None = None):
        self._num_dispatchers, self._quantize, self._arrange_scales = num_dispatchers, quantize, arrange_scales

    @staticmethod
    def maybe_roundup_layer_hidden_size(hidden_size: int, dtype: Dtype = None) -> int:
        """As it is: a row is any multiple of 16 bytes."""
        return hidden_size

    def num_dispatchers(self) -> int:
        return self._num_dispatchers

    def output_is_reduced(self) -> bool:
        """Whether `output` has the sum over all expert-parallel ranks; else over the data-parallel ones alone."""
        return self._is_reduced

    def supports_async(self) -> bool:
        return self._is_async

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def topk_indices_dtype(self) -> Dtype | None:
        """None: int32 and int64 alike."""
        return self._ids_dtype and arrays.default().dtype(self._ids_dtype)

    def prepare(
        self, a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None,
        apply_router_weight_on_input: bool, quant_config: Any = None, defer_input_quant: bool = False,
    ) -> PrepareResult:
        """a1 [M, H], topk_weights [M, K] float32, topk_ids [M, K] global ids, -1 none. expert_map is the experts' affair."""
        hook, receive = self._start(a1, topk_weights, topk_ids, num_experts, apply_router_weight_on_input, quant_config,
                                    defer_input_quant, later=False)
        hook()
        return receive()

    def prepare_async(
        self, a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None,
        apply_router_weight_on_input: bool, quant_config: Any = None, defer_input_quant: bool = False,
    ) -> tuple[Callable[[], None], Receiver]:
        """(hook, receiver): hook receives, receiver gives what prepare does. Both once, in this order."""
        self._need_async("prepare_async")
        return self._start(a1, topk_weights, topk_ids, num_experts, apply_router_weight_on_input, quant_config, defer_input_quant,
                           later=True)

    def finalize(
        self, output: Tensor, fused_expert_output: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        apply_router_weight_on_input: bool, weight_and_reduce_impl: Any,
    ) -> None:
        """output [M, H] is written. Standard: topk_weights and topk_ids are those of prepare; BatchedExperts: this rank's own."""
        self._combine(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl,
                      later=False)

    def finalize_async(
        self, output: Tensor, fused_expert_output: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        apply_router_weight_on_input: bool, weight_and_reduce_impl: Any,
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """(hook, receiver): output is written once hook has been called."""
        self._need_async("finalize_async")
        hook = self._combine(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl,
                             later=True)
        return hook, lambda: None

    # ------------------------------------------------------------------------------------------------- what subclasses have

    def _send(self, x: Tensor, scales: Tensor | None, weights: Tensor, ids: Tensor, num_experts: int,
              later: bool) -> tuple[Callable[[], None], Receiver]:
        """Dispatches. What the receiver gives has scales by row."""
        raise NotImplementedError

    def _combine(self, output: Tensor, rows: Tensor, weights: Tensor, ids: Tensor, applied: bool, impl: Any,
                 later: bool) -> Callable[[], None]:
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------------- inside

    def _need_async(self, what: str) -> None:
        if not self._is_async:
            raise NotImplementedError(f"{type(self).__name__} has no {what}: its halves are not apart")

    def _start(self, a1, topk_weights, topk_ids, num_experts, apply_router_weight_on_input, quant_config, defer_input_quant, later):
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise ValueError(f"apply_router_weight_on_input is for a top-k of 1, it is {topk_ids.shape[1]}")
            library = arrays.of(a1)
            a1 = a1 * library.cast(topk_weights, library.name_of(a1))
        x, scales = self._quantized(a1, quant_config, defer_input_quant)
        # A scale of one value is the same on all ranks.
        shared, sent = (scales, None) if scales is not None and len(scales.shape) == 0 else (None, scales)
        hook, receive = self._send(x, sent, topk_weights, topk_ids, num_experts, later)

        def arranged() -> PrepareResult:
            rows, received, counts, ids, weights = receive()
            rows, received = self._received(rows, received, quant_config)
            return rows, shared if shared is not None else received, counts, ids, weights

        return hook, arranged

    def _received(self, rows: Tensor, scales: Tensor | None, quant_config: Any) -> tuple[Tensor, Tensor | None]:
        """Values and scales as the experts want them."""
        if scales is None or self._arrange_scales is None:
            return rows, scales
        return rows, self._arrange_scales(scales, quant_config)

    def _quantized(self, a1: Tensor, quant_config: Any, deferred: bool) -> tuple[Tensor, Tensor | None]:
        """Values to send, and their scales."""
        return (a1, None) if deferred or self._quantize is None else self._quantize(a1, quant_config)


def sums_of(rows: Tensor, weights: Tensor, ids: Tensor, applied: bool, impl: Any) -> Tensor:
    """[rows, H] for the wire: what the experts wrote, weighted and summed over k where they left that to us ([rows, K, H])."""
    if rows.shape[0] == 0:
        return rows.reshape(0, rows.shape[-1])
    if delegated(impl):
        return arrays.weighted(rows.reshape(*ids.shape, rows.shape[-1]), None if applied else weights)
    return impl.apply(output=None, fused_expert_output=rows, topk_weights=weights, topk_ids=ids, apply_router_weight_on_input=applied)


class MoEPrepareAndFinalizeNaiveDPEPModular(PrepareAndFinalize):
    """Over AgRsAll2AllManager: every rank has every token."""

    _is_reduced = False

    def __init__(self, manager: AgRsAll2AllManager, is_sequence_parallel: bool = False, num_dispatchers: int = 1, **quantisation):
        super().__init__(num_dispatchers, **quantisation)
        self.manager, self.is_sequence_parallel = manager, is_sequence_parallel

    def _send(self, x, scales, weights, ids, num_experts, later):
        received: tuple = self.manager.dispatch(x, weights, ids, self.is_sequence_parallel, None if scales is None else [scales])
        rows, weights, ids = received[:3]
        return nothing, lambda: (rows, None if scales is None else received[3][0], None, ids, weights)

    def _combine(self, output, rows, weights, ids, applied, impl, later):
        self.manager.combine_into_output(sums_of(rows, weights, ids, applied, impl), output, self.is_sequence_parallel)
        return nothing


class DeepEPHTPrepareAndFinalize(PrepareAndFinalize):
    """Over DeepEPHTAll2AllManager's buffer: a row for each (token, rank), as many as came."""

    _ids_dtype = "int64"
    _is_async = True

    def __init__(self, buffer: HighThroughputBuffer, num_dispatchers: int, dp_size: int, rank_expert_offset: int, **quantisation):
        super().__init__(num_dispatchers, **quantisation)
        self.buffer, self.dp_size, self.rank_expert_offset = buffer, dp_size, rank_expert_offset
        # By micro-batch: dispatches whose combine is still to come.
        self.handles: dict[int, Handle] = {}

    def _send(self, x, scales, weights, ids, num_experts, later):
        library = arrays.of(x)
        rows, ids, weights, counts, handle = self.buffer.dispatch_global(x if scales is None else (x, scales), ids, weights, num_experts)
        self.handles[self.buffer.engine.ubatch] = handle
        rows, scales = rows if isinstance(rows, tuple) else (rows, None)
        meta = ExpertTokensMetadata(library.from_list(counts, "int32", library.device_of(x)), library.from_list(counts, "int32"))
        return nothing, lambda: (rows, scales, meta, library.cast(ids, self._ids_dtype), weights)

    def _combine(self, output, rows, weights, ids, applied, impl, later):
        ubatch = self.buffer.engine.ubatch
        self.buffer.combine_into(sums_of(rows, weights, ids, applied, impl), self.handles[ubatch], output)
        del self.handles[ubatch]  # only now: what is refused may be called again
        return nothing


class BatchedPrepareAndFinalize(PrepareAndFinalize):
    """Rows by expert; dispatch quantises, combine weights and sums. A subclass has `_dispatch` and `_combined`."""

    activation_format = FusedMoEActivationFormat.BatchedExperts
    _ids_dtype = "int64"
    _is_async = True

    def __init__(
        self, buffer: Any, max_tokens_per_rank: int, num_dispatchers: int, use_fp8_dispatch: bool = False,
        global_to_physical: Tensor | None = None, physical_to_global: Tensor | None = None,
        local_expert_global_ids: Tensor | None = None, quantize: Quantize | None = None,
    ):
        """global_to_physical: [E] where an expert is, for placements that are not contiguous; the other two are the experts' affair.
        quantize: of received rows, where dispatch does not quantise."""
        super().__init__(num_dispatchers, quantize)
        self.buffer, self.max_tokens_per_rank, self.use_fp8_dispatch = buffer, max_tokens_per_rank, use_fp8_dispatch
        self.global_to_physical, self.physical_to_global = global_to_physical, physical_to_global
        self.local_expert_global_ids = local_expert_global_ids
        # Packed scales that are powers of two.
        self.use_ue8m0_dispatch = False
        # By micro-batch: dispatches whose combine is still to come.
        self.handles: dict[int, Handle] = {}

    def post_init_setup(self, fused_experts: Any) -> None:
        """Packed scales for experts that take them."""
        self.use_ue8m0_dispatch = self.use_fp8_dispatch and fused_experts.supports_packed_ue8m0_act_scales()

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_tokens_per_rank

    def _quantized(self, a1, quant_config, deferred):
        if deferred:
            raise NotImplementedError(f"{type(self).__name__}: dispatch quantises or nobody does, defer_input_quant is for Standard rows")
        return a1, None

    def _received(self, rows, scales, quant_config):
        return (rows, scales) if self.use_fp8_dispatch or self._quantize is None else self._quantize(rows, quant_config)

    def _dispatch(self, x: Tensor, ids: Tensor, max_tokens: int, num_experts: int, **switches: bool) -> tuple:
        """The buffer's dispatch."""
        raise NotImplementedError

    def _combined(self, rows: Tensor, ids: Tensor, weights: Tensor, handle: Handle, **switches: Any) -> tuple:
        """The buffer's combine."""
        raise NotImplementedError

    def _physical(self, ids: Tensor) -> Tensor:
        if self.global_to_physical is None:
            return ids
        library = arrays.of(ids)
        return library.where(ids >= 0, self.global_to_physical[library.where(ids >= 0, ids, 0)], -1)

    def _send(self, x, scales, weights, ids, num_experts, later):
        switches = dict(use_fp8=self.use_fp8_dispatch, round_scale=self.use_ue8m0_dispatch, use_ue8m0=self.use_ue8m0_dispatch)
        rows, counts, handle, _, hook = self._dispatch(
            x, self._physical(ids), self.max_tokens_per_rank, num_experts, **switches, return_recv_hook=later)
        self.handles[self.buffer.engine.ubatch] = handle

        def receive() -> PrepareResult:
            values, scales = rows if isinstance(rows, tuple) else (rows, None)
            return values, scales, ExpertTokensMetadata(counts), None, None

        return hook, receive

    def _combine(self, output, rows, weights, ids, applied, impl, later):
        if not delegated(impl):
            raise ValueError(f"{type(self).__name__} weights and sums: weight_and_reduce_impl is {type(impl).__name__}, "
                             "it must be TopKWeightAndReduceDelegate")
        library = arrays.of(weights)
        weights = library.ones_like(weights) if applied else weights
        ubatch = self.buffer.engine.ubatch
        *_, hook = self._combined(rows, self._physical(ids), library.cast(weights, "float32"), self.handles[ubatch],
                                  return_recv_hook=later, out=output)
        del self.handles[ubatch]  # only now: what is refused may be called again
        return hook


class DeepEPLLPrepareAndFinalize(BatchedPrepareAndFinalize):
    """Over DeepEPLLAll2AllManager's buffer."""

    buffer: LowLatencyBuffer

    def _dispatch(self, *arguments, **switches):
        return self.buffer.low_latency_dispatch(*arguments, **switches)

    def _combined(self, *arguments, **switches):
        return self.buffer.low_latency_combine(*arguments, **switches)


class NixlEPPrepareAndFinalize(BatchedPrepareAndFinalize):
    """Over NixlEPAll2AllManager's buffer. num_dispatchers is max_num_ep_ranks, expert_capacity that many times the experts of a rank:
    shapes stay when the group changes."""

    buffer: NixlBuffer

    def __init__(self, buffer: NixlBuffer, max_tokens_per_rank: int, num_dispatchers: int, expert_capacity: int, **others):
        super().__init__(buffer, max_tokens_per_rank, num_dispatchers, **others)
        self.expert_capacity = expert_capacity

    def _dispatch(self, x, ids, max_tokens, num_experts, **switches):
        return self.buffer.dispatch(x, ids, max_tokens, self.expert_capacity, **switches)

    def _combined(self, *arguments, **switches):
        return self.buffer.combine(*arguments, **switches)


class FlashInferPrepareAndFinalize(PrepareAndFinalize):
    """[R * max_tokens, H] rows; steps are the communication's, one for each micro-batch. A subclass has `_dispatch`."""

    manager: Any

    def _dispatch(self, x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, **step: Any) -> Received:
        """The communication's dispatch."""
        raise NotImplementedError

    def _largest(self, own: int) -> int:
        """Tokens of the rank that has most in this step; without the engine's word all have as many."""
        return max(self.manager.engine.local_sizes or [own])

    def _send(self, x, scales, weights, ids, num_experts, later):
        received = self._dispatch(x, ids, weights, num_experts, hidden_states_scale=scales, max_tokens_per_rank=self._largest(x.shape[0]))
        result = received.hidden_states, received.hidden_states_scale, None, received.topk_ids, received.topk_weights
        return nothing, lambda: result

    def _combine(self, output, rows, weights, ids, applied, impl, later):
        self.manager.get_communication().combine(sums_of(rows, weights, ids, applied, impl), output=output)
        return nothing


class FlashInferNVLinkOneSidedPrepareAndFinalize(FlashInferPrepareAndFinalize):
    """Over FlashInferNVLinkOneSidedManager, whose communication it makes, or makes large enough."""

    _ids_dtype = "int32"

    def __init__(
        self, manager: FlashInferNVLinkOneSidedManager, max_num_tokens: int, top_k: int, num_experts: int, hidden_size: int,
        dispatch_format: Any = None, extra_payload_bytes_per_token: int = 0, num_dispatchers: int = 1, **quantisation,
    ):
        super().__init__(num_dispatchers, **quantisation)
        self.manager = manager
        manager.initialize(max_num_tokens, top_k, num_experts, hidden_size, dispatch_format, extra_payload_bytes_per_token)

    def _dispatch(self, x, ids, weights, num_experts, **step):
        return self.manager.get_communication().dispatch(x, ids, weights, **step)


class FlashInferNVLinkTwoSidedPrepareAndFinalize(FlashInferPrepareAndFinalize):
    """Over FlashInferNVLinkTwoSidedManager."""

    def __init__(self, manager: FlashInferNVLinkTwoSidedManager, num_dispatchers: int = 1, **quantisation):
        super().__init__(num_dispatchers, **quantisation)
        self.manager = manager

    def _dispatch(self, x, ids, weights, num_experts, **step):
        return self.manager.get_communication().dispatch(x, ids, weights, num_experts=num_experts, **step)
