"""The comms of one group: one for each shape of rows, made by all ranks together when first used.

Every rank uses the same shapes in the same order, as it makes all its calls in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import a2a

from . import arrays, groups
from .arrays import Tensor

# Dispatches that may be under way at once: two micro-batches.
SLOTS = 2

logger = logging.getLogger(__name__)


class Wire:
    """A comm and a routing for each of its slots. Dispatches take a slot by name or in turns: the same one on every rank."""

    def __init__(self, comm: a2a.Comm, quantises: bool = False):
        self.comm, self.quantises = comm, quantises
        self.routings = [comm.routing(slot) for slot in range(comm.info.num_slots)]
        # What batched.py knows of where steps stand.
        self.views: dict[tuple, Any] = {}
        self.turn = 0
        # Dispatches so far, and by slot the number of the one that has it.
        self.dispatches = 0
        self.holders: dict[int, int] = {}
        self.closed = False

    @property
    def next_routing(self) -> a2a.Routing:
        """The next dispatch's."""
        return self.routings[self.turn % len(self.routings)]

    def dispatch(self, tokens: Tensor, *arguments, slot: int | None = None, **keywords) -> tuple[Handle, a2a.Received]:
        """Comm.dispatch, but for its RECV, on a slot, or where none is named on the next in turn. A call that is refused takes neither
        a turn nor the slot from the dispatch that has it."""
        routing = self.next_routing if slot is None else self.routings[slot]
        try:
            received = self.comm.dispatch(routing, tokens, *arguments, **keywords)
        except a2a.CallError:
            raise
        except a2a.Error:
            self.holders.pop(routing.slot, None)
            raise
        self.turn += slot is None
        self.dispatches += 1
        self.holders[routing.slot] = self.dispatches
        return Handle(self, routing, self.dispatches, tokens.shape[0], arrays.of(tokens)), received

    def lost(self, size: int) -> list[int]:
        """Of each of the first ranks: 1 if it takes no part, is dead, or was given up on, else 0."""
        failure = self.comm.async_error()
        given_up = failure.lost_ranks if failure else ()
        return [int(not there or rank in given_up) for rank, there in enumerate(self.comm.rank_mask()[:size])]

    def restart(self) -> None:
        """After ranks have agreed on who takes part: turns begin anew, as steps do, and what was under way is void."""
        self.turn = 0
        self.holders.clear()

    def close(self) -> None:
        """Waits for this rank's own work, as the last step may still be under way on a stream, and for nobody else."""
        self.views.clear()  # they would keep the comm's memory
        if self.closed:
            return
        self.closed = True
        try:
            arrays.synchronize(self.comm.info.device, self.comm.info.device_ordinal)
        except RuntimeError as failure:  # a device that has failed has no work under way, and all that is left goes all the same
            logger.warning("rank %d: a comm is closed on a device that has failed: %s", self.comm.info.rank, failure)
        self.comm.close()


@dataclass(eq=False)
class Handle:
    """A dispatch whose combine is still to come."""

    wire: Wire
    routing: a2a.Routing
    # Of the wire's dispatches, from 1.
    number: int
    # Of this rank's.
    tokens: int
    # Of its tokens.
    library: arrays.Arrays

    @property
    def comm(self) -> a2a.Comm:
        """The comm, for what comes after the dispatch. Refused once the slot is another dispatch's: its routing is that one's then."""
        holder = self.wire.holders.get(self.routing.slot)
        if holder != self.number:
            info = self.wire.comm.info
            taken = "is void: ranks have agreed anew on who takes part, or its slot failed" if holder is None else f"was given up for {holder}"
            raise RuntimeError(f"rank {info.rank}: dispatch {self.number} {taken}; slot {self.routing.slot} of {info.num_slots} held it, and "
                               f"at most {info.num_slots} dispatches may be between dispatch and combine")
        return self.wire.comm


class Comms:
    """`group` is where its ranks meet. A wire that is too small gets a larger one beside it: captured graphs, and dispatches that are
    under way, keep the one they have."""

    def __init__(self, group, rank: int, size: int, engine):
        self.group, self.rank, self.size, self.engine = group, rank, size, engine
        self._wires: dict[tuple, list[Wire]] = {}

    def __iter__(self) -> Iterator[Wire]:
        return (wire for wires in self._wires.values() for wire in wires)

    def config(self, **fields) -> a2a.Config:
        """A config with these fields, and those that all comms of the group have."""
        device, ordinal = self.engine.device
        return a2a.Config(rank=self.rank, num_ranks=self.size, device=device, device_ordinal=ordinal, num_slots=SLOTS,
                          allgather=self._allgather if self.size > 1 else None, **fields)

    def wire(self, max_tokens: int, **fields) -> Wire:
        """The wire whose comm has these fields and takes steps of max_tokens. Collective where there is none yet."""
        wires = self._wires.setdefault(tuple(sorted(fields.items())), [])
        if not wires or wires[-1].comm.info.max_tokens < max_tokens:
            wires.append(Wire(a2a.Comm(self.config(max_tokens=max_tokens, **fields)), quantises=bool(fields.get("quant"))))
        return wires[-1]

    def check(self, **fields) -> None:
        """Refuses fields that no comm of this group could have, before anybody waits for one."""
        a2a.query_memory(self.config(**fields))

    def mask(self) -> list[int]:
        """Of each rank: 1 if some comm has lost it, else 0."""
        masks = [wire.lost(self.size) for wire in self]
        return [int(any(mask[rank] for mask in masks)) for rank in range(self.size)]

    def recover(self) -> None:
        """Collective over the ranks that are left: every comm goes on among them."""
        for wire in self:
            wire.comm.recover()
            wire.restart()

    def slot(self) -> int:
        """The slot of the calling thread's micro-batch, the same on all ranks."""
        ubatch = self.engine.ubatch
        if not 0 <= ubatch < SLOTS:
            raise ValueError(f"rank {self.rank}: the engine's micro-batch is {ubatch}, it must be from 0 to {SLOTS - 1}")
        return ubatch

    def synchronize(self) -> None:
        """Waits for what this rank has given its device; never for longer than a step's deadline."""
        arrays.synchronize(*self.engine.device)

    def close(self) -> None:
        """Frees all of it, once this rank's own work is done. Waits for no other rank. May be called again."""
        for wire in self:
            wire.close()
        self._wires.clear()

    def _allgather(self, own: bytes) -> list[bytes]:
        return [bytes.fromhex(theirs) for theirs in groups.gather(self.group, own.hex())]
