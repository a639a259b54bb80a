"""DeepEPHTAll2AllManager and DeepEPLLAll2AllManager, and the buffers that their get_handle gives, with the calls of deep_ep.Buffer."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import a2a

from . import arrays, batched, faults
from .arrays import Tensor
from .base import All2AllManagerBase, Cache
from .batched import Event
from .comms import Comms, Handle


class Buffer:
    """What get_handle gives: comms of one set of limits, made by all ranks when a shape of rows is first used."""

    def __init__(self, comms: Comms):
        self.comms, self.engine = comms, comms.engine
        weakref.finalize(self, comms.close)

    def destroy(self) -> None:
        """Frees its memory, once this rank's own work is done. May be called again; a buffer that nobody holds any more is freed too."""
        self.comms.close()

    @staticmethod
    def capture() -> Event:
        """An event after all that the current stream was given."""
        return Event()


class HighThroughputBuffer(Buffer):
    """deep_ep.Buffer in its normal mode: one row for each (token, rank), as many as came, which is waited for."""

    def __init__(self, comms: Comms, max_tokens: int):
        super().__init__(comms)
        self.max_tokens = max_tokens
        # Bound of the multiprocessors that calls may use; 0: the library's choice.
        self.num_sms = 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> None:
        """There is nothing to tune by hand."""

    @staticmethod
    def get_combine_config(num_ranks: int) -> None:
        """There is nothing to tune by hand."""

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):
        """(tokens for each rank [R] int32, None, for each expert [E] int32, which token goes to which rank [T, R] bool, event)."""
        library = arrays.of(topk_idx)
        chosen = (topk_idx[:, :, None] == library.arange(num_experts, library.device_of(topk_idx))).any(1)
        each, more = divmod(num_experts, self.comms.size)
        first = [rank * each + min(rank, more) for rank in range(self.comms.size + 1)]
        to_rank = library.stack([chosen[:, begin:end].any(1) for begin, end in zip(first, first[1:])])
        return library.cast(to_rank.sum(0), "int32"), None, library.cast(chosen.sum(0), "int32"), to_rank, Event()

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], handle: Any = None, num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None, is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        expert_alignment: int = 1, config: Any = None, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):
        """(rows or (rows, scales), ids [N, K]: the expert's number on this rank, or -1, weights [N, K], counts: a list of L, each rounded
        up to expert_alignment, handle, event). All but x, topk_idx, topk_weights and the length of num_tokens_per_expert tells nothing new."""
        if handle is not None or topk_idx is None or topk_weights is None or num_tokens_per_expert is None:
            raise ValueError("dispatch takes topk_idx, topk_weights and num_tokens_per_expert, and no handle: a routing that is used again "
                             "is training's (A2A_DISPATCH_REUSE of liba2a itself)")
        rows, ids, weights, counts, handle = self.dispatch_global(x, topk_idx, topk_weights, num_tokens_per_expert.shape[0])
        library, info = arrays.of(topk_idx), handle.wire.comm.info
        local = ids - info.first_expert
        ids = library.where((ids >= 0) & (local >= 0) & (local < info.num_local_experts), local, -1)
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        return rows, library.cast(ids, library.name_of(topk_idx)), weights, counts, handle, Event()

    def dispatch_global(self, x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor, topk_weights: Tensor, num_experts: int):
        """(rows or (rows, scales), global ids [N, K] int32, weights [N, K], counts: a list of L, handle)."""
        tokens, scales = map(arrays.rows, x) if isinstance(x, tuple) else (arrays.rows(x), None)
        library = arrays.of(tokens)
        scale_fields = {} if scales is None else dict(max_scale_bytes=arrays.row_bytes(scales))
        wire = self.comms.wire(
            self.max_tokens, backend=a2a.Backend.HIGH_THROUGHPUT, layout=a2a.Layout.FLAT, num_experts=num_experts,
            max_topk=topk_idx.shape[1], **arrays.row_fields(tokens), **scale_fields,
        )
        want = ("tokens", "topk_ids", "topk_weights", "expert_counts") + (("scales",) if scales is not None else ())
        handle, received = wire.dispatch(
            tokens, topk_idx, topk_weights, scales, want=want, flags=a2a.DispatchFlag.HOST_COUNTS, max_sms=self.num_sms,
        )
        rows = library.take(received.tokens)
        rows = rows if scales is None else (rows, library.take(received.scales))
        ids, weights = library.take(received.topk_ids), library.take(received.topk_weights)
        counts = library.take(received.expert_counts).tolist()
        return rows, ids, weights, counts, handle

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, config: Any = None, previous_event: Any = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ):
        """(sums [T, H] of the ranks' rows, None, event)."""
        if topk_weights is not None:
            raise ValueError("combine takes no topk_weights: rows are weighted by then, and gradients of weights are training's (row_weights "
                             "of liba2a itself)")
        return self.combine_into(x, handle), None, Event()

    def combine_into(self, x: Tensor, handle: Handle, out: Tensor | None = None) -> Tensor:
        """Sums [T, H], in `out` if it is given."""
        if out is None:
            out = arrays.empty((handle.tokens, x.shape[1]), x)
        handle.comm.combine(handle.routing, arrays.rows(x), out=out, max_sms=self.num_sms)
        return out


class LowLatencyBuffer(Buffer):
    """deep_ep.Buffer in its low-latency mode: one row for each (token, expert), in its expert's block."""

    def __init__(self, comms: Comms, max_tokens: int, max_hidden: int, num_experts: int):
        super().__init__(comms)
        self.max_tokens, self.max_hidden, self.num_experts = max_tokens, max_hidden, num_experts
        comms.check(max_tokens=max_tokens, **self._fields("bfloat16", ""))

    def _fields(self, dtype: str, quant: str) -> dict:
        return dict(
            backend=a2a.Backend.LOW_LATENCY, num_experts=self.num_experts, max_topk=min(a2a.MAX_TOPK, self.num_experts),
            max_hidden=self.max_hidden, token_dtype=dtype, **batched.fields_of(quant),
        )

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int, *,
        cumulative_local_expert_recv_stats: Tensor | None = None, use_fp8: bool = True, round_scale: bool = False,
        use_ue8m0: bool = False, use_nvfp4: bool = False, x_global_scale: Tensor | None = None, async_finish: bool = False,
        return_recv_hook: bool = False,
    ):
        """(rows [L, R * M, H], or (e4m3 rows, scales), counts [L] int32, handle, event, hook); hook receives if return_recv_hook."""
        if use_nvfp4:
            raise NotImplementedError("low_latency_dispatch makes no nvfp4: dispatch bf16 rows and quantise what is received, or rows that "
                                      "are nvfp4 already by FlashInfer's managers or AgRsAll2AllManager")
        if num_experts != self.num_experts:
            raise ValueError(f"rank {self.comms.rank}: num_experts is {num_experts}, the buffer was made for {self.num_experts}")
        quant = batched.format_of(use_fp8, round_scale, use_ue8m0)
        wire = self.comms.wire(self.max_tokens, **self._fields(arrays.of(x).name_of(x), quant))
        return batched.dispatch(wire, x, topk_idx, num_max_dispatch_tokens_per_rank, return_recv_hook, cumulative_local_expert_recv_stats)

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle, *, zero_copy: bool = False,
        async_finish: bool = False, return_recv_hook: bool = False, out: Tensor | None = None,
    ):
        """(out [T, H], event, hook). topk_idx is what dispatch had: where rows went is in the handle. zero_copy says that x is
        get_next_low_latency_combine_buffer's, which is seen without it."""
        return batched.combine(handle, x, topk_weights, return_recv_hook, out)

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """[L, R * M, H]: where experts write what combine then need not copy."""
        return batched.combine_buffer(handle)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes [R] int32: 0 live, 1 lost, as faults.py knows it."""
        library = arrays.of(mask_status)
        library.copy(mask_status, faults.as_tensor(self.comms.mask(), self.engine, library))

    def low_latency_clean_mask_buffer(self) -> None:
        """Collective over the ranks that are left: goes on among them."""
        self.comms.recover()


class DeepEPAll2AllManagerBase(All2AllManagerBase):
    """What both modes of DeepEP have."""

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.handle_cache = Cache()
        self.num_sms = 20

    def _comms(self) -> Comms:
        return Comms(self.meeting_group, self.rank, self.world_size, self.engine)

    def _used(self) -> list[Comms]:
        return [handle.comms for handle in self.handle_cache.handles()]

    def destroy(self):
        for handle in self.handle_cache.handles():
            handle.destroy()
        self.handle_cache.clear()


class DeepEPHTAll2AllManager(DeepEPAll2AllManagerBase):
    """Rows without gaps, for large steps."""

    # Of multiprocessors; 0: the library's choice.
    _bound = 0

    def _make_all2all_kwargs(self) -> dict[Any, Any]:
        return dict(max_tokens=self.engine.max_num_batched_tokens)

    def get_handle(self, kwargs):
        """A HighThroughputBuffer, one for the whole model. kwargs is empty."""
        if kwargs:
            raise ValueError(f"DeepEPHTAll2AllManager.get_handle takes an empty dict, it was given {', '.join(kwargs)}")
        handle = self.handle_cache.get_or_create(self._make_all2all_kwargs(), partial(HighThroughputBuffer, self._comms()))
        handle.num_sms = self._bound
        return handle

    def set_num_sms(self, num_sms: int):
        """Bounds later calls on this manager's handle: to 20 at most, as in vLLM. Returns what is in effect."""
        self._bound = min(num_sms, self.num_sms)
        for handle in self.handle_cache.handles():
            handle.num_sms = self._bound
        return self._bound


class DeepEPLLAll2AllManager(DeepEPAll2AllManagerBase):
    """Rows by expert, for small steps, with halves that can be apart."""

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.support_fault_tolerance = self.engine.enable_fault_tolerance

    def _make_all2all_kwargs(
        self,
        max_num_tokens_per_dp_rank: int,
        token_hidden_size: int,
        num_ep_ranks: int,
        num_global_experts: int,
        num_local_experts: int,
    ) -> dict[Any, Any]:
        owned = {num_global_experts // self.world_size, -(-num_global_experts // self.world_size)}
        if num_ep_ranks != self.world_size or num_local_experts not in owned:
            raise ValueError(f"rank {self.rank}: {num_global_experts} experts on {num_ep_ranks} ranks, {num_local_experts} of them here; the "
                             f"group has {self.world_size} ranks, which own {' or '.join(map(str, sorted(owned)))} each")
        return dict(max_tokens=max_num_tokens_per_dp_rank, max_hidden=token_hidden_size, num_experts=num_global_experts)

    def get_handle(self, kwargs):
        """A LowLatencyBuffer; layers with the same limits share one. kwargs are those of _make_all2all_kwargs."""
        return self.handle_cache.get_or_create(self._make_all2all_kwargs(**kwargs), partial(LowLatencyBuffer, self._comms()))

    def max_sms_used(self) -> int | None:
        return 0
