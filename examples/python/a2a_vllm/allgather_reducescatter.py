"""AgRsAll2AllManager: every rank gets every token; partial sums are added over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import a2a

from . import arrays
from .arrays import Tensor
from .base import All2AllManagerBase
from .comms import Comms, Handle

# Bytes of the smallest row of tokens.
LEAST_ROW = 16


@dataclass
class Gathered:
    """A dispatch whose combine is still to come."""

    handle: Handle
    rows: int
    # Bytes of a combine's row at most.
    result_bytes: int


class AgRsAll2AllManager(All2AllManagerBase):
    """dispatch gathers tensors of rows, any type and width, over the group; combine sums rows over it and gives each rank its own.

    What is gathered is the caller's own memory. The group is the expert-parallel one for sequence-parallel inputs, else the
    data-parallel one, as the engine's sizes are of that one; sums are over that group.
    """

    _instead = "dispatch and combine are its own"

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.use_ep = self.engine.enable_expert_parallel
        self._comms: dict[str, Comms] = {}
        self._open: dict[tuple[str, int], Gathered] = {}

    def dispatch_router_logits(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        hidden_states, router_logits, *extras = self._gather([hidden_states, router_logits], extra_tensors, is_sequence_parallel)
        return (hidden_states, router_logits) if extra_tensors is None else (hidden_states, router_logits, extras)

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        given = [hidden_states, topk_weights, topk_ids]
        hidden_states, topk_weights, topk_ids, *extras = self._gather(given, extra_tensors, is_sequence_parallel)
        if extra_tensors is None:
            return hidden_states, topk_weights, topk_ids
        return hidden_states, topk_weights, topk_ids, extras

    def combine(self, hidden_states: Tensor, is_sequence_parallel: bool = False) -> Tensor:
        _, group = self._group(is_sequence_parallel)
        own = self._sizes(group, hidden_states.shape[0] // group.world_size)[group.rank_in_group]
        output = arrays.empty((own, *hidden_states.shape[1:]), hidden_states)
        return self.combine_into_output(hidden_states, output, is_sequence_parallel)

    def combine_into_output(
        self,
        hidden_states: Tensor,
        output: Tensor,
        is_sequence_parallel: bool = False,
    ) -> Tensor:
        name, group = self._group(is_sequence_parallel)
        sizes = self._sizes(group, hidden_states.shape[0] // group.world_size)
        if hidden_states.shape[0] != sum(sizes):
            raise ValueError(f"rank {self.rank}: combine has {hidden_states.shape[0]} rows, the group's sizes are {sizes}")
        rows, sums = arrays.rows(hidden_states), arrays.rows(output)
        step = self._open.pop((name, self.engine.ubatch), None)
        if step is None or step.rows != rows.shape[0] or step.result_bytes < arrays.row_bytes(rows):
            step = self._sized_for(rows, name, group, sizes)
        try:
            step.handle.comm.combine(step.handle.routing, rows, sums)
        except a2a.CallError:  # nothing happened
            self._open[name, self.engine.ubatch] = step
            raise
        if not arrays.same_memory(sums, output):  # rows that are not compact
            arrays.of(output).copy(output, sums.reshape(output.shape))
        return output

    def destroy(self):
        for comms in self._comms.values():
            comms.close()
        self._comms.clear()
        self._open.clear()

    def _gather(self, tensors: list[Tensor], extras: list[Tensor] | None, is_sequence_parallel: bool) -> list[Tensor]:
        tensors = tensors + list(extras or ())
        name, group = self._group(is_sequence_parallel)
        sizes = self._sizes(group, tensors[0].shape[0])
        for number, tensor in enumerate(tensors):
            if tensor.shape[0] != sizes[group.rank_in_group]:
                raise ValueError(f"rank {self.rank}: tensor {number} of dispatch has {tensor.shape[0]} rows, the engine's sizes say "
                                 f"{sizes[group.rank_in_group]} (of {sizes})")
        if len(tensors) - 1 > a2a.MAX_EXTRAS:
            raise ValueError(f"rank {self.rank}: dispatch has {len(tensors) - 1} tensors beside hidden_states, "
                             f"the limit is {a2a.MAX_EXTRAS}")
        gathered = [arrays.empty((sum(sizes), *tensor.shape[1:]), tensor) for tensor in tensors]
        self._open[name, self.engine.ubatch] = self._dispatched(name, group, sizes, tensors, gathered)
        return gathered

    def _dispatched(
        self, name: str, group, sizes: list[int], tensors: list[Tensor], gathered: list[Tensor],
        result_bytes: int | None = None,
    ) -> Gathered:
        tokens, *extras = map(arrays.rows, tensors)
        out_tokens, *out_extras = map(arrays.rows, gathered)
        fields = arrays.row_fields(tokens, result_bytes)
        comms = self._of(name, group)
        wire = comms.wire(
            2 ** ceil(log2(max(*sizes, 1))),
            backend=a2a.Backend.ALLGATHER_REDUCESCATTER, num_experts=group.world_size, max_topk=1,
            extra_row_bytes=tuple(map(arrays.row_bytes, extras)), **fields,
        )
        handle, _ = wire.dispatch(tokens, extras=extras, max_tokens=max(sizes), rank_tokens=sizes,
                                  out=dict(tokens=out_tokens, extras=out_extras), want=(), slot=comms.slot())
        return Gathered(handle, sum(sizes), 2 * fields["combine_hidden"])

    def _sized_for(self, rows: Tensor, name: str, group, sizes: list[int]) -> Gathered:
        """A dispatch of next to nothing, for a combine of rows that no dispatch came before, or one of smaller rows."""
        library = arrays.of(rows)
        own, every = (library.empty((count, LEAST_ROW), library.dtype("uint8"), library.device_of(rows))
                      for count in (sizes[group.rank_in_group], sum(sizes)))
        return self._dispatched(name, group, sizes, [own], [every], arrays.row_bytes(rows))

    def _group(self, is_sequence_parallel: bool):
        """The group of a call, and its name."""
        if is_sequence_parallel:
            return "ep", self.engine.ep_group
        if self.dp_world_size == 1:
            return "pcp", self.engine.pcp_group
        if self.use_ep and self.engine.pcp_group.world_size > 1:
            if self.tp_group.world_size != 1:
                raise ValueError(f"rank {self.rank}: with data and context parallelism and {self.tp_group.world_size} tensor-parallel "
                                 "ranks inputs are sequence-parallel: pass is_sequence_parallel=True")
            return "ep", self.engine.ep_group
        return "dp", self.dp_group

    def _sizes(self, group, own: int) -> list[int]:
        """Rows of each rank of the group; without the engine's word as many as here, everywhere."""
        sizes = None if self.dp_world_size == 1 else self.engine.local_sizes
        if sizes is None:
            return [own] * group.world_size
        if len(sizes) != group.world_size:
            raise ValueError(f"rank {self.rank}: the engine's sizes are {sizes}, for {len(sizes)} ranks; the group of this call has "
                             f"{group.world_size}")
        return list(sizes)

    def _of(self, name: str, group) -> Comms:
        if name not in self._comms:
            meeting = getattr(group, "tcp_store_group", None) or group.cpu_group
            self._comms[name] = Comms(meeting, group.rank_in_group, group.world_size, self.engine)
        return self._comms[name]
