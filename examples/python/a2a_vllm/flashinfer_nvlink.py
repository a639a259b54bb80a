"""FlashInferNVLinkOneSidedManager and FlashInferNVLinkTwoSidedManager, and what their get_communication gives."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import a2a

from . import arrays, groups
from .arrays import Tensor
from .base import All2AllManagerBase
from .comms import Comms, Handle

# By the name of a format: bytes of a row of H values, and of its scales.
FORMATS = {
    "BF16": (lambda hidden: 2 * hidden, lambda hidden: 0),
    "FP16": (lambda hidden: 2 * hidden, lambda hidden: 0),
    "FP8PerTensor": (lambda hidden: hidden, lambda hidden: 0),
    "DeepSeekFp8": (lambda hidden: hidden, lambda hidden: 4 * ceil(hidden / 128)),
    "MXFP8": (lambda hidden: hidden, lambda hidden: ceil(hidden / 32)),
    "NVFP4": (lambda hidden: ceil(hidden / 2), lambda hidden: ceil(hidden / 16)),
    "MXFP4": (lambda hidden: ceil(hidden / 2), lambda hidden: ceil(hidden / 32)),
}


@dataclass(frozen=True)
class Capacity:
    """What a communication has room for. Two are joined by `|`: room for either."""

    max_tokens: int
    hidden_size: int
    token_bytes: int
    scale_bytes: int

    @classmethod
    def of(cls, max_tokens: int, hidden_size: int, dispatch_format: Any, extra_bytes: int) -> Capacity:
        """dispatch_format: a name in FORMATS, an enum member with such a name, or None for BF16."""
        name = getattr(dispatch_format, "name", dispatch_format) or "BF16"
        if name not in FORMATS:
            raise ValueError(f"dispatch_format is {name!r}, known are {', '.join(FORMATS)}")
        tokens, scales = FORMATS[name]
        return cls(max_tokens, hidden_size, tokens(hidden_size), scales(hidden_size) + extra_bytes)

    def __or__(self, other: Capacity) -> Capacity:
        return Capacity(max(self.max_tokens, other.max_tokens), max(self.hidden_size, other.hidden_size),
                        max(self.token_bytes, other.token_bytes), max(self.scale_bytes, other.scale_bytes))


@dataclass
class Received:
    """[R * max_tokens, *] of each, as FlashInfer's dispatch gives it; valid until combine.

    topk_ids are global; rows past the counts have -1 everywhere, and zeros in the rest.
    """

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    # [R] int32: rows from each rank.
    tokens_per_rank: Tensor


@dataclass(eq=False)
class Step:
    """A dispatch whose combine is still to come."""

    handle: Handle
    # As they were received: [R, M] or [R * M].
    shape: tuple[int, ...]
    like: Tensor


class Communication:
    """Steps of one micro-batch alternate: dispatch, combine. Another micro-batch, which has the other slot, may be between its own two."""

    def __init__(self, manager: All2AllManagerBase):
        self.comms = Comms(manager.meeting_group, manager.rank, manager.world_size, manager.engine)
        self._engine = manager.engine
        self._open: dict[int, Step] = {}

    def _next(self) -> int:
        """The slot of a dispatch."""
        if self._engine.ubatch in self._open:
            raise RuntimeError(f"rank {self.comms.rank}: micro-batch {self._engine.ubatch} dispatches again before it has combined")
        return self.comms.slot()

    def void(self) -> None:
        """What was under way is not combined any more."""
        self._open.clear()

    def get_combine_input_buffer(self, dtype: Any = None) -> Tensor:
        """[R * max_tokens, H]: where experts write what combine then need not copy."""
        step = self._step()
        library = arrays.of(step.like)
        name = None if dtype is None else a2a.element_type(dtype)
        buffer = library.take(step.handle.comm.combine_buffer(step.handle.routing, name))
        return buffer.reshape(-1, buffer.shape[-1])

    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
        """output [T, H]: sums over ranks of [R * max_tokens, H] (or [R, max_tokens, H]), weighted and summed over the experts there."""
        step = self._step()
        if output is None:
            output = arrays.empty((step.like.shape[0], expert_output.shape[-1]), expert_output)
        rows = expert_output.reshape(*step.shape, expert_output.shape[-1])
        del self._open[self._engine.ubatch]
        try:
            step.handle.comm.combine(step.handle.routing, rows, output)
        except a2a.CallError:  # nothing happened
            self._open[self._engine.ubatch] = step
            raise
        return output

    def destroy(self) -> None:
        """Frees its memory, once this rank's own work is done. May be called again."""
        self.void()
        self.comms.close()

    def _step(self) -> Step:
        if self._engine.ubatch not in self._open:
            raise RuntimeError(f"rank {self.comms.rank}: micro-batch {self._engine.ubatch} has not dispatched")
        return self._open[self._engine.ubatch]


class OneSidedCommunication(Communication):
    """flashinfer.moe_ep's NVLinkOneSidedAlltoAll over NVLINK_ONE_SIDED: rows lie by source rank, without an exchange of counts."""

    def __init__(self, manager: All2AllManagerBase, top_k: int, num_experts: int, capacity: Capacity):
        super().__init__(manager)
        self.top_k, self.num_experts, self.capacity = top_k, num_experts, capacity
        self._wire = self.comms.wire(
            capacity.max_tokens, backend=a2a.Backend.NVLINK_ONE_SIDED, num_experts=num_experts, max_topk=top_k,
            token_dtype=a2a.Dtype.U8, max_hidden=-(-capacity.token_bytes // 16) * 16, max_scale_bytes=capacity.scale_bytes,
            combine_dtype=a2a.Dtype.BF16, combine_hidden=capacity.hidden_size,
        )

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, hidden_states_scale: Tensor | None = None,
        max_tokens_per_rank: int | None = None,
    ) -> Received:
        """max_tokens_per_rank: of this step, the same on all ranks; None: as many as there is room for."""
        slot, library = self._next(), arrays.of(hidden_states)
        bound = self.capacity.max_tokens if max_tokens_per_rank is None else max(max_tokens_per_rank, 1)
        scales = {} if hidden_states_scale is None else dict(scales=arrays.rows(hidden_states_scale))
        want = ("tokens", "topk_ids", "topk_weights", "rank_counts", *scales)
        handle, received = self._wire.dispatch(
            arrays.rows(hidden_states), topk_ids, topk_weights, **scales,
            max_tokens=bound, want=want, flags=a2a.DispatchFlag.ZERO_PADDING, slot=slot,
        )
        shape = received.tokens.shape[:-1]
        self._open[self._engine.ubatch] = Step(handle, shape, hidden_states)

        def flat(name: str) -> Tensor:
            rows = library.take(getattr(received, name))
            return rows.reshape(-1, *rows.shape[2:])

        return Received(flat("tokens"), flat("scales") if scales else None, flat("topk_ids"), flat("topk_weights"),
                        library.take(received.rank_counts))


class TwoSidedCommunication(Communication):
    """FlashInfer's all2allv over NVLINK_TWO_SIDED: rows travel through bounded FIFOs into tensors that are made for them."""

    def dispatch(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, num_experts: int,
        hidden_states_scale: Tensor | None = None, max_tokens_per_rank: int,
    ) -> Received:
        """max_tokens_per_rank: of this step, the same on all ranks."""
        slot, bound = self._next(), max(max_tokens_per_rank, 1)
        tokens = arrays.rows(hidden_states)
        given = dict(tokens=tokens, topk_ids=topk_ids, topk_weights=topk_weights)
        scale_fields = {}
        if hidden_states_scale is not None:
            given["scales"] = arrays.rows(hidden_states_scale)
            scale_fields = dict(max_scale_bytes=arrays.row_bytes(given["scales"]))
        wire = self.comms.wire(
            2 ** ceil(log2(bound)), backend=a2a.Backend.NVLINK_TWO_SIDED, num_experts=num_experts, max_topk=topk_ids.shape[1],
            **arrays.row_fields(tokens), **scale_fields,
        )
        rows = self.comms.size * bound
        out = {name: arrays.empty((rows, *tensor.shape[1:]), tensor) for name, tensor in given.items()}
        handle, received = wire.dispatch(
            **given, max_tokens=bound, out=out, want=("rank_counts",), flags=a2a.DispatchFlag.ZERO_PADDING, slot=slot,
        )
        self._open[self._engine.ubatch] = Step(handle, (rows,), hidden_states)
        return Received(out["tokens"], out.get("scales"), out["topk_ids"], out["topk_weights"],
                        arrays.of(hidden_states).take(received.rank_counts))


class FlashInferManager(All2AllManagerBase):
    """What both managers have: a communication, once it is initialized."""

    communication: Communication | None = None

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.initialized = False

    def get_handle(self, kwargs):
        return self

    def cleanup(self):
        """Frees the communication. initialize makes another."""
        if self.communication is not None:
            self.communication.destroy()
        self.communication, self.initialized = None, False

    def destroy(self):
        self.cleanup()

    def clean_buffers(self) -> None:
        if self.communication is not None:
            self.communication.void()
        super().clean_buffers()

    def _used(self) -> list[Comms]:
        return [] if self.communication is None else [self.communication.comms]


class FlashInferNVLinkOneSidedManager(FlashInferManager):
    """One communication for all layers, with room for the largest of each thing that they asked for."""

    communication: OneSidedCommunication | None

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.top_k = self.num_experts = 0
        # What checkpoint_prepare took away.
        self._to_restore: Capacity | None = None

    def initialize(
        self,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        hidden_size: int,
        dispatch_format: QuantFormat | None = None,
        extra_payload_bytes_per_token: int = 0,
    ) -> None:
        """Collective, of every layer in the same order. What is asked for is there afterwards: where there was less, another
        communication takes the place of the old one (get_communication), which is why graphs are captured later."""
        if extra_payload_bytes_per_token < 0:
            raise ValueError(f"extra_payload_bytes_per_token is {extra_payload_bytes_per_token}, it must not be negative")
        for name, asked, has in (("top_k", top_k, self.top_k), ("num_experts", num_experts, self.num_experts)):
            if self.initialized and asked != has:
                raise ValueError(f"rank {self.rank}: {name} is {asked}, other layers have {has}: all layers have the same")
        capacity = Capacity.of(max_num_tokens, hidden_size, dispatch_format, extra_payload_bytes_per_token)
        if self._to_restore is not None:
            capacity = capacity | self._to_restore
        if self.communication is not None:
            capacity = capacity | self.communication.capacity
            if capacity == self.communication.capacity:
                return
            self.communication.comms.synchronize()
            groups.gather(self.meeting_group, "grow")  # nobody is in a step any more
            self.cleanup()
        self.communication = OneSidedCommunication(self, top_k, num_experts, capacity)
        self.top_k, self.num_experts, self.initialized, self._to_restore = top_k, num_experts, True, None

    def get_communication(self) -> NVLinkOneSidedAlltoAll:
        """What there is now; a later layer may replace it."""
        if self.communication is None:
            why = "initialize has not been called, or cleanup has" if self._to_restore is None else "checkpoint_restore has not been called"
            raise RuntimeError(f"rank {self.rank}: there is no communication: {why}")
        return self.communication

    def cleanup(self):
        """Frees the communication, and forgets what checkpoint_restore would make."""
        super().cleanup()
        self._to_restore = None

    def checkpoint_prepare(self) -> None:
        """Frees all memory, once this rank's own work is done, until checkpoint_restore (or a layer's initialize)."""
        if self.communication is not None:
            self._to_restore = self.communication.capacity
            self.communication.destroy()
            self.communication = None

    def checkpoint_restore(self) -> None:
        """Collective: takes the memory again. Captured graphs are captured anew. After cleanup, or destroy, there is nothing to take."""
        if self._to_restore is not None:
            self.communication = OneSidedCommunication(self, self.top_k, self.num_experts, self._to_restore)
            self._to_restore = None


NVLinkOneSidedAlltoAll = OneSidedCommunication
QuantFormat = Any


class FlashInferNVLinkTwoSidedManager(FlashInferManager):
    """Memory is taken by the first dispatch of a shape, of which initialize knows nothing yet."""

    communication: TwoSidedCommunication | None

    def initialize(
        self,
        world_size: int,
        rank: int,
        gpus_per_node: int,
    ):
        """world_size and rank are the group's. gpus_per_node changes nothing: who reaches whom is found out."""
        if self.initialized:
            return
        if (world_size, rank) != (self.world_size, self.rank):
            raise ValueError(f"initialize: rank is {rank} of {world_size}, the manager's group has rank {self.rank} of {self.world_size}")
        self.communication, self.initialized = TwoSidedCommunication(self), True

    def ensure_alltoall_workspace_initialized(self):
        """False where there is nobody to exchange rows with."""
        if self.world_size <= 1:
            return False
        self.initialize(self.world_size, self.rank, self.world_size)
        return self.initialized

    def get_communication(self) -> TwoSidedCommunication:
        if not self.ensure_alltoall_workspace_initialized() or self.communication is None:
            raise RuntimeError("the group has one rank: there is no all-to-all workspace")
        return self.communication
