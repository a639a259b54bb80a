"""NixlEPAll2AllManager: rows by expert between ranks that come and go.

The process has one buffer, which outlives managers: an engine makes a new manager for each size of its group.

    grow    the ranks that are there   new manager, stage_ep_size (meets and connects), ..., commit_ep_size
            the new ones               new manager, get_handle (meets and connects), warm up, then their first step without
                                       mask_remote_ranks (or commit_ep_size)
    shrink  the ranks that stay        new manager, stage_ep_size (nothing yet), ..., commit_ep_size
            the others                 destroy

commit_ep_size and a new rank's first step are one collective: all ranks of the new size agree that they take part from now on.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import a2a

from . import batched, faults, groups
from .arrays import Tensor
from .base import All2AllManagerBase
from .comms import SLOTS, Handle, Wire
from .engine import AnyEngine


@dataclass
class Limits:
    """What a buffer is made for."""

    max_num_tokens_per_dp_rank: int
    token_hidden_size: int
    num_local_experts: int


class NixlBuffer:
    """nixl_ep.Buffer's dispatch and combine, over NIXL_ELASTIC."""

    def __init__(self, wire: Wire, quant: str, engine: AnyEngine):
        self.wire, self.quant, self.engine = wire, quant, engine
        self.rank = wire.comm.info.rank
        # Called before each dispatch, where a rank that has warmed up joins the others.
        self.before_step: Callable[[], None] = batched.nothing

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int, *, use_fp8: bool = True,
        round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False, return_recv_hook: bool = False,
    ):
        """(rows [L, max ranks * M, H], or (e4m3 rows, scales), counts [L] int32, handle, event, hook); hook receives if return_recv_hook."""
        asked, has = batched.format_of(use_fp8, round_scale, use_ue8m0), self.wire.comm.info.num_experts
        if asked != self.quant:
            raise ValueError(f"rank {self.rank}: dispatch is to give {asked or 'rows as they are'}, the buffer was made for "
                             f"{self.quant or 'rows as they are'}: the engine's nixl_dispatch says which (\"\", \"fp8\", \"ue8m0\")")
        if num_experts != has:
            raise ValueError(f"rank {self.rank}: num_experts is {num_experts}, the buffer was made for {has}: local experts times most ranks")
        self.before_step()
        return batched.dispatch(self.wire, x, topk_idx, num_max_dispatch_tokens_per_rank, return_recv_hook)

    def combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle, *, zero_copy: bool = False,
        async_finish: bool = False, return_recv_hook: bool = False, out: Tensor | None = None,
    ):
        """(out [T, H], event, hook). topk_idx is what dispatch had: where rows went is in the handle."""
        return batched.combine(handle, x, topk_weights, return_recv_hook, out)

    def get_next_combine_buffer(self, handle: Handle) -> Tensor:
        """[L, max ranks * M, H]: where experts write what combine then need not copy."""
        return batched.combine_buffer(handle)


@dataclass
class State:
    """The process's buffer, and who is on it."""

    buffer: NixlBuffer
    limits: Limits
    # What others find the group by.
    name: str
    connected_ep_size: int
    # Ranks that take part in steps are those below it, without those that were lost.
    active_ep_size: int
    # A new rank's, until it joins.
    alone: bool
    masked: bool = False


class NixlEPAll2AllManager(All2AllManagerBase):
    """Ranks are 0 to world_size - 1 of a group that may grow to max_num_ep_ranks; each has as many experts, whoever takes part."""

    _state: State | None = None
    _lock = threading.RLock()
    # Managers that have not been destroyed: the last one frees the buffer.
    _managers = 0
    _process_watch = faults.Watch()

    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.support_fault_tolerance = True
        self._watch = self._process_watch
        self._destroyed = False
        with self._lock:
            NixlEPAll2AllManager._managers += 1

    @property
    def max_num_ep_ranks(self) -> int:
        return self._need().buffer.wire.comm.info.max_ranks

    def get_handle(self, kwargs):
        """The process's NixlBuffer: made by the first call, of which all ranks of the group take part, or those that are there by
        stage_ep_size. kwargs: max_num_tokens_per_dp_rank, token_hidden_size, num_local_experts; later calls have the same."""
        limits = Limits(**kwargs)
        with self._lock:
            state = self._state
            if state is None:
                state = NixlEPAll2AllManager._state = self._made(limits)
            elif limits != state.limits:
                raise ValueError(f"rank {self.rank}: get_handle asks for {limits}, the process's one buffer was made for {state.limits}")
            state.buffer.before_step = self._join
            return state.buffer

    def stage_ep_size(self) -> None:
        """A group that is larger than the one connected: meets the new ranks and connects to them. Steps go on beside it."""
        with self._lock:
            state = self._need()
            if self.world_size > state.connected_ep_size:
                self._meet(state.name, state.connected_ep_size)
                self._connect(state)

    def commit_ep_size(self) -> None:
        """Collective over the ranks of this manager's group: from now on they take part, and nobody else. Slots are idle."""
        with self._lock:
            state = self._need()
            self.stage_ep_size()
            ranks = list(range(self.world_size))
            if ranks != [rank for rank, there in enumerate(state.buffer.wire.comm.rank_mask()) if there]:
                self._activate(ranks)
            state.active_ep_size, state.alone = self.world_size, False
            gone = list(range(self.world_size, state.connected_ep_size))
            if gone:
                state.buffer.wire.comm.disconnect_ranks(gone)
                state.connected_ep_size = self.world_size

    @contextmanager
    def mask_remote_ranks(self) -> Iterator[None]:
        """This rank's steps are its own alone, to warm up. No other rank that takes part begins a step meanwhile."""
        state = self._need()
        wire = state.buffer.wire
        comm, turn, there = wire.comm, wire.turn, wire.comm.rank_mask()
        comm.set_rank_mask(rank == self.rank for rank in range(len(there)))
        state.masked = True
        try:
            yield
        finally:
            state.masked, wire.turn = False, turn
            comm.set_rank_mask(there)

    def destroy(self):
        """The last of the process's managers frees the buffer."""
        with self._lock:
            if self._destroyed:
                return
            self._destroyed = True
            NixlEPAll2AllManager._managers -= 1
            if self._managers == 0 and self._state is not None:
                self._state.buffer.wire.close()
                NixlEPAll2AllManager._state = None
                self._watch.clean([])

    def max_sms_used(self) -> int | None:
        return 0

    def clean_buffers(self) -> None:
        """Collective over the ranks that are left: from now on they take part, and what was under way is void."""
        with self._lock:
            if self._state is None:
                return
            mask = self._mask()
            self._activate([rank for rank, lost in enumerate(mask) if not lost])
            self._watch.clean(mask)

    def _need(self) -> State:
        if self._state is None:
            raise RuntimeError(f"rank {self.rank}: the process has no NIXL buffer yet: get_handle makes it")
        return self._state

    def _mask(self) -> list[int]:
        """Of the ranks that take part."""
        state = self._need()
        return state.buffer.wire.lost(state.active_ep_size)

    def _made(self, limits: Limits) -> State:
        """The buffer, and a place among those that are there, if any are."""
        name, members = self._meet("", 0)
        alone = self.rank >= members
        device, ordinal = self.engine.device
        quant, max_ranks = self.engine.nixl_dispatch, self.engine.capacity(self.world_size)
        flags = a2a.ConfigFlag.REMOTE if self.internode else 0
        if self.engine.enable_fault_tolerance and device == a2a.Device.CPU:
            flags |= a2a.ConfigFlag.DEGRADE
        num_experts = max_ranks * limits.num_local_experts
        wire = Wire(a2a.Comm(
            rank=self.rank, num_ranks=1 if alone else members, max_ranks=max_ranks, device=device, device_ordinal=ordinal,
            backend=a2a.Backend.NIXL_ELASTIC, num_experts=num_experts, max_topk=min(a2a.MAX_TOPK, num_experts),
            max_hidden=limits.token_hidden_size, max_tokens=limits.max_num_tokens_per_dp_rank, num_slots=SLOTS, flags=flags,
            unique_id=bytes.fromhex(name), **batched.fields_of(quant),
        ), quantises=bool(quant))
        state = State(NixlBuffer(wire, quant, self.engine), limits, name, 0 if alone else members, self.world_size, alone)
        if alone:
            try:
                self._connect(state)
            except a2a.Error:
                wire.close()
                raise
        return state

    def _meet(self, name: str, members: int) -> tuple[str, int]:
        """The group's name and how many ranks were there before this manager's group met; all of it, where none were. Collective."""
        words = groups.gather(self.meeting_group, [name or (self._new_name() if self.rank == 0 else ""), members])
        there = [word for word in words if word[1]] or [[words[0][0], self.world_size]]
        return there[0][0], there[0][1]

    def _connect(self, state: State) -> None:
        """To the ranks of this manager's group that are not connected yet. Collective over them and those that are."""
        state.buffer.wire.comm.connect_ranks(range(state.connected_ep_size, self.world_size))
        state.connected_ep_size = self.world_size

    def _activate(self, ranks: list[int]) -> None:
        wire = self._need().buffer.wire
        wire.comm.activate_ranks(ranks)
        wire.restart()

    def _join(self) -> None:
        """A new rank that has warmed up takes part with its first step."""
        if self._state is not None and self._state.alone and not self._state.masked:
            self.commit_ep_size()

    def _new_name(self) -> str:
        """A new group's unique id, in hexadecimal digits."""
        made = a2a.UniqueId.create()
        if self.internode:
            made = a2a.UniqueId.from_address(self.engine.address or _free_address(), bytes(made).hex())
        return bytes(made).hex()


def _free_address() -> str:
    """This host's address, and a port that is free now."""
    with socket.create_server(("", 0)) as free:
        return f"{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"
