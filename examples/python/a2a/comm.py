"""A rank's membership of a group, and the steps it takes with it: dispatch, the experts, combine."""

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from ctypes import byref, c_int32, c_uint64, c_void_p, pointer
from typing import Any, NamedTuple, TypeVar, overload

from . import _abi, _cuda
from ._abi import CombineFlag, Device, DispatchFlag, Info, Phase, Stats, Status, StepFlag
from ._library import library
from ._lifetime import Handle, Lease
from ._outputs import Outputs, pointed, writable
from .config import Config, config_of
from .errors import CallError, Error, OverflowError, StepError, error_of
from .step import Received, Rows, Step, Sums
from .tensor import SupportsDLPack, Tensor, as_tensor, element_type, empty, int32, view_of

BOTH, SEND, RECV = Phase.BOTH, Phase.SEND, Phase.RECV
Array = SupportsDLPack | Any  # whatever as_tensor takes
T = TypeVar("T")

ENOUGH_HISTORY = 128 << 10  # bytes, by a2a.h


class AsyncError(NamedTuple):
    """A comm's first failure. operation: 1 dispatch, 2 combine, 3 between two dispatches, 0 none of these; peer: -1 if none."""

    status: Status
    operation: int
    slot: int
    rank: int
    peer: int
    sequence: int
    expected: int
    seen: int
    lost_ranks: tuple[int, ...]
    message: str


class Recovery(NamedTuple):
    """What the survivors agreed on. whole_steps: by slot, the last step that is whole on every member."""

    generation: int
    members: tuple[int, ...]
    replaced: bool
    whole_steps: tuple[int, ...]


class Routing:
    """Where the rows of one dispatch went, bound to a slot; made by `Comm.routing`. One for each layer, or one for all."""

    def __init__(self, comm: "Comm", slot: int):
        pointer = c_void_p()
        comm._call("a2a_routing_create", slot, byref(pointer))
        self.slot = slot
        self._comm = comm
        self._handle = Handle(f"the routing of slot {slot}", pointer, library().a2a_routing_destroy)
        self._step = Step()
        self._status = empty(4 + comm.info.num_ranks, int32)  # of its last step, on the CPU

    def close(self) -> None:
        """Frees it; a second time does nothing."""
        self._handle.close()

    def __enter__(self) -> "Routing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Comm:
    """One rank's membership of a group. Collective: every rank makes one, with the same config but for its rank.

    `with` closes it. Any thread may call, one at a time; a second gets BusyError. `abort`, `async_error`, `history`, `info`,
    `rank_mask`, `set_timeout` and `stats` may be called at any time.
    """

    def __init__(self, config: Config | None = None, **settings: Any):
        self.config = config_of(config, settings)
        raw, handle = self.config.raw(), c_void_p()
        try:
            library().a2a_create(raw, byref(handle))
        except Error as error:
            raise error from raw.failure
        self._handle = Handle(
            f"the comm of rank {self.config.rank}", handle, library().a2a_destroy, leave=library().a2a_abort
        )
        self.info = Info()
        self._call("a2a_get_info", self.info)
        self._on_cuda = self.info.device == Device.CUDA
        self._outputs = Outputs(self.info, raw)
        self._leases: dict[int, Lease] = {}
        # Halves that wait for their RECV, and what was given to those: some backends read it only there.
        self._sent: set[tuple[str, int]] = set()
        self._kept: list[Any] = []

    # ----------------------------------------------------------------------------------------------------------- its life

    def close(self) -> None:
        """Ends the comm, without waiting for anybody; a second time does nothing. Peers that still wait for this rank get
        PeerLostError. On CUDA work that still waits for a peer ends too: synchronise the stream before. Views end; memory that
        somebody took by DLPack or memoryview stays until it is let go."""
        self._end_views("the comm was closed")
        self._handle.close()
        self._kept.clear()

    def abort(self) -> None:
        """Ends every call in flight with AbortedError, and every later one. Returns at once."""
        self._call("a2a_abort")

    def __enter__(self) -> "Comm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._handle.closed:
            return "a2a.Comm(closed)"
        info = self.info
        return f"a2a.Comm(rank {info.rank} of {info.num_ranks}, {info.backend.name.lower()}, {info.layout.name.lower()})"

    def stats(self) -> Stats:
        """What this rank has moved so far."""
        stats = Stats()
        self._call("a2a_get_stats", stats)
        return stats

    def history(self) -> dict[str, Any]:
        """The last 256 operations, the one in flight among them, from any thread: where a rank that hangs is."""
        text = ctypes.create_string_buffer(ENOUGH_HISTORY)
        self._call("a2a_get_history", text, len(text), None)
        told: dict[str, Any] = json.loads(text.value)
        return told

    def async_error(self) -> AsyncError | None:
        """The first failure; None if there was none."""
        info = _abi.ErrorInfo()
        self._call("a2a_get_async_error", info)
        if info.status == Status.SUCCESS:
            return None
        return AsyncError(
            info.status, info.operation, info.slot, info.rank, info.peer, info.sequence, info.expected, info.seen,
            _marked(info.lost_ranks), info.message.decode(errors="replace"),
        )

    def set_timeout(self, first_step_timeout_ms: int = 0, timeout_ms: int = 0) -> None:
        """How long later calls of this rank wait for peers; 0 leaves a value as it is."""
        self._call("a2a_set_timeout", first_step_timeout_ms, timeout_ms)

    # ------------------------------------------------------------------------------------------------------------- members

    def recover(self, timeout_ms: int = 0, patience_ms: int = 0) -> Recovery:
        """After a loss, on every survivor: they agree on who they are, and go on in this comm, with every slot idle."""
        out = _abi.RecoverOut()
        self._end_views("the comm recovered")
        self._call("a2a_recover", _abi.RecoverIn(timeout_ms=timeout_ms, patience_ms=patience_ms), out)
        self._forget_sent()
        return Recovery(
            out.generation, _marked(out.members), bool(out.replaced), tuple(out.whole_steps[: self.info.num_slots])
        )

    def connect_ranks(self, ranks: Iterable[int], timeout_ms: int = 0) -> None:
        """Connects to ranks, each of which names this one; steps of the others go on (NIXL_ELASTIC)."""
        array = _int32s(ranks)
        self._call("a2a_connect_ranks", array, len(array), timeout_ms)

    def activate_ranks(self, ranks: Iterable[int], timeout_ms: int = 0) -> int:
        """Agrees with these ranks, this one among them, that they take part from now on and nobody else. Gives the generation."""
        array, generation = _int32s(ranks), c_uint64()
        self._end_views("other ranks take part")
        self._call("a2a_activate_ranks", array, len(array), timeout_ms, generation)
        self._forget_sent()
        return generation.value

    def disconnect_ranks(self, ranks: Iterable[int]) -> None:
        """Forgets ranks that take no part."""
        array = _int32s(ranks)
        self._call("a2a_disconnect_ranks", array, len(array))

    def rank_mask(self) -> tuple[bool, ...]:
        """By rank: takes part and, as far as this rank knows, lives."""
        mask = (c_int32 * self.info.max_ranks)()
        self._call("a2a_get_rank_mask", mask, len(mask))
        return tuple(map(bool, mask))

    def set_rank_mask(self, mask: Iterable[Any]) -> None:
        """By rank, what is true takes part: this rank alone, to warm up, or all again (NIXL_ELASTIC)."""
        array = _int32s(map(bool, mask))
        self._call("a2a_set_rank_mask", array, len(array))

    # --------------------------------------------------------------------------------------------------------------- steps

    def routing(self, slot: int = 0) -> Routing:
        """A routing for steps on a slot."""
        return Routing(self, slot)

    def dispatch(
        self, routing: Routing, tokens: Array = None, topk_ids: Array = None, topk_weights: Array = None, scales: Array = None,
        extras: Sequence[Array] = (), *, max_tokens: int = 0, rank_tokens: Sequence[int] | None = None, phase: Phase | int = BOTH,
        flags: DispatchFlag | int = 0, out: Mapping[str, Any] | None = None, want: Sequence[str] | None = None,
        stream: Any = None, max_sms: int = 0,
    ) -> Received:
        """Sends each token to the ranks that own its experts and receives what the others sent. Collective.

        tokens [T, H], topk_ids [T, K] int32 or int64 (None with REUSE, and allowed with GATHERED), topk_weights [T, K] float32
        (None: 1 each), scales [T, S], extras: up to 8 tensors [T, *]. max_tokens: the bound on T in this step, the same on every
        rank; 0 = the config's. rank_tokens: every rank's T, if it is known.
        out: tensors of the caller's for outputs by name, "expert_stats" among them; too few rows raise OverflowError. want: the
        other outputs, views; None = all that this layout and these inputs have. Where the backend keeps no rows
        (NVLINK_TWO_SIDED), row outputs that out does not have are made anew on the CPU, and must be in it on CUDA.
        stream: on CUDA a handle or a stream object; None = the current one of the tokens' framework. Tensors stay as they are
        until it has done the work.

        SEND gives a Received that `dispatch_recv` fills. Views are valid until combine SEND.
        """
        if phase == RECV:
            return self.dispatch_recv(routing, flags=flags, out=out, want=want, stream=stream, max_sms=max_sms)
        if tokens is None:
            raise TypeError("tokens is None: a rank without tokens dispatches a tensor of shape [0, H]")
        framework = _cuda.framework_of(tokens) if self._on_cuda else ""
        handle = self._stream_of(stream, framework, tokens)
        given = {"tokens": tokens, "topk_ids": topk_ids, "topk_weights": topk_weights, "scales": scales}
        inputs = {name: as_tensor(array, stream=handle) for name, array in given.items() if array is not None}
        others = [None if array is None else as_tensor(array, stream=handle) for array in extras]
        if len(others) > _abi.MAX_EXTRAS:
            raise ValueError(f"extras has {len(others)} tensors, at most {_abi.MAX_EXTRAS} travel")
        raw = pointed(
            _abi.DispatchIn(max_tokens=max_tokens, phase=phase, flags=flags, max_sms=max_sms), {**inputs, "extras": others}
        )
        if rank_tokens is not None:
            if len(rank_tokens) != self.info.num_ranks:
                raise ValueError(f"rank_tokens has {len(rank_tokens)} entries, num_ranks is {self.info.num_ranks}")
            raw.rank_tokens = _int32s(rank_tokens)
        rows = {name: Rows.of(tensor) for name, tensor in inputs.items()}
        if flags & DispatchFlag.REUSE and "topk_ids" in routing._step.rows:
            rows["topk_ids"] = routing._step.rows["topk_ids"]
        step = Step(
            num_tokens=inputs["tokens"].shape[0] if inputs["tokens"].ndim else 0, rows=rows,
            extras=[None if other is None else Rows.of(other) for other in others], bound=max_tokens or self.info.max_tokens,
            framework=framework, stream=handle or 0, named=stream, out=out, want=want,
        )
        if phase == SEND:
            self._run("dispatch", routing, raw, None, handle, (inputs, others))
            routing._step = step
            return step.received
        outputs, taken = self._taking(routing, step, handle)
        self._run("dispatch", routing, raw, taken, handle, (inputs, others))
        routing._step = step
        return self._receive(routing, outputs, taken.num_rows)

    def dispatch_recv(
        self, routing: Routing, *, flags: DispatchFlag | int = 0, out: Mapping[str, Any] | None = None,
        want: Sequence[str] | None = None, stream: Any = None, max_sms: int = 0,
    ) -> Received:
        """Completes what dispatch SEND began, and fills what that returned. out, want and flags: as there, if not given there."""
        step = routing._step
        step.out, step.want = step.out if out is None else out, step.want if want is None else want
        handle = self._next_stream(step, stream, step.framework, None)
        outputs, taken = self._taking(routing, step, handle)
        raw = _abi.DispatchIn(phase=RECV, flags=flags, max_sms=max_sms)
        self._run("dispatch", routing, raw, taken, handle)
        return self._receive(routing, outputs, taken.num_rows)

    def combine_buffer(self, routing: Routing, dtype: Any = None) -> Tensor:
        """Where the experts may write their rows so that combine copies nothing, shaped for the routing's dispatch. None: the
        config's combine_dtype. Valid until combine SEND."""
        raw = _abi.Tensor()
        if dtype is not None:
            raw.dtype = _abi.TensorDtype(*element_type(dtype))
        self._call("a2a_combine_buffer", routing._handle.pointer, raw)
        lease = self._leases.setdefault(routing.slot, Lease(self._handle, routing._handle))
        return view_of(raw, lease, routing._step.stream, routing._step.framework)

    @overload
    def combine(
        self, routing: Routing, results: Array = ..., out: None = None, *, weights: Array = ..., row_weights: Array = ...,
        weights_out: Array = ..., status: Array = ..., accumulate: bool = ..., flags: CombineFlag | int = ...,
        phase: Phase | int = ..., stream: Any = ..., max_sms: int = ...,
    ) -> Tensor: ...

    @overload
    def combine(
        self, routing: Routing, results: Array = ..., out: T = ..., *, weights: Array = ..., row_weights: Array = ...,
        weights_out: Array = ..., status: Array = ..., accumulate: bool = ..., flags: CombineFlag | int = ...,
        phase: Phase | int = ..., stream: Any = ..., max_sms: int = ...,
    ) -> T: ...

    def combine(
        self, routing: Routing, results: Array = None, out: Any = None, *, weights: Array = None, row_weights: Array = None,
        weights_out: Array = None, status: Array = None, accumulate: bool = False, flags: CombineFlag | int = 0,
        phase: Phase | int = BOTH, stream: Any = None, max_sms: int = 0,
    ) -> Any:
        """Brings the experts' rows back and sums them for each of this rank's tokens; gives `out`.

        results: rows of the shape that dispatch received, bf16, f16 or f32: what `combine_buffer` gave, or any other. out [T, H];
        None: made anew on the CPU, of the type of results, and refused on CUDA. weights [T, K] float32: instead of those given to
        dispatch (EXPERT_* layouts). row_weights [rows, K] float32, of every rank or none, go to weights_out [T, K]. status: an
        int32 tensor [4 + R] for the step's status. accumulate: add to what out holds. stream: as for dispatch.

        SEND gives the out that `combine_recv` fills.
        """
        if phase == RECV:
            return self.combine_recv(routing, out, weights_out=weights_out, status=status, accumulate=accumulate, flags=flags,
                                     stream=stream, max_sms=max_sms)
        if results is None:
            raise TypeError("results is None: combine needs the experts' rows")
        step = routing._step
        step.named = stream
        handle = self._next_stream(step, stream, _cuda.framework_of(results) if self._on_cuda else "", results)
        given = {"tokens": results, "topk_weights": weights, "row_weights": row_weights}
        inputs = {name: as_tensor(array, stream=handle) for name, array in given.items() if array is not None}
        if out is None and not self._on_cuda:
            rows = inputs["tokens"]
            out = empty((step.num_tokens, *rows.shape[-1:]), rows.dtype)
        flags |= CombineFlag.ACCUMULATE if accumulate else 0
        raw = pointed(_abi.CombineIn(phase=phase, flags=flags, max_sms=max_sms), inputs)
        sums = Sums(out, weights_out, status, flags)
        if phase == SEND:
            self._run("combine", routing, raw, None, handle, inputs)
            step.sums = sums
        else:
            self._run("combine", routing, raw, self._sums(sums, handle), handle, inputs)
        return out

    def combine_recv(
        self, routing: Routing, out: Any = None, *, weights_out: Array = None, status: Array = None, accumulate: bool = False,
        flags: CombineFlag | int = 0, stream: Any = None, max_sms: int = 0,
    ) -> Any:
        """Completes what combine SEND began, and gives out. What is not given here is as it was given there."""
        step = routing._step
        given = step.sums
        sums = Sums(
            given.out if out is None else out, given.weights_out if weights_out is None else weights_out,
            given.status if status is None else status, given.flags | flags | (CombineFlag.ACCUMULATE if accumulate else 0),
        )
        handle = self._next_stream(step, stream, step.framework, None)
        raw = _abi.CombineIn(phase=RECV, flags=sums.flags, max_sms=max_sms)
        self._run("combine", routing, raw, self._sums(sums, handle), handle)
        step.sums = Sums()
        return sums.out

    # -------------------------------------------------------------------------------------------------------------- inside

    def _call(self, name: str, *arguments: Any) -> None:
        """Calls the library on this comm. A lost step's error names the ranks that were given up on."""
        try:
            getattr(library(), name)(self._handle.pointer, *arguments)
        except StepError as error:
            lost = self.async_error() if name in ("a2a_dispatch", "a2a_combine", "a2a_combine_buffer") else None
            # The record is of the first loss: another slot's may have been by other ranks.
            same = lost is not None and lost.message.partition("; last: ")[0] in error.message
            raise error_of(error.status, error.message, lost.lost_ranks if lost and same else ()) from None

    def _run(
        self, operation: str, routing: Routing, raw: Any, out: Any, stream: int | None, given: Any = None
    ) -> None:
        """One half of dispatch or combine, or both (out: None in SEND), and what becomes of views and of what was given."""
        half = operation, routing.slot
        try:
            self._call(f"a2a_{operation}", routing._handle.pointer, raw, out, stream)
        except CallError as error:
            if not (isinstance(error, OverflowError) and (over := self._overflowing(out))):
                raise  # nothing happened
            self._end_views(f"its slot's {operation} overflowed", routing.slot)
            self._received_half(half)
            raise error_of(error.status, error.message, over) from None
        except Error as error:
            self._end_views(f"its slot's {operation} failed, {error.name}", routing.slot)
            self._received_half(half)
            raise
        if raw.phase != RECV:
            self._end_views(f"its slot's {operation} has been sent", routing.slot)
        if raw.phase == SEND:
            self._sent.add(half)
        else:
            self._received_half(half)
        # Some backends read it only in a RECV, of whichever slot.
        if self._sent and raw.phase != RECV:
            self._kept.append(given)

    def _overflowing(self, out: Any) -> tuple[int, ...]:
        """The ranks that would have received too many rows, if it was the step that overflowed: on the CPU its status says so."""
        if self._on_cuda or not isinstance(out, _abi.DispatchOut):
            return ()
        words = (c_int32 * (4 + self.info.num_ranks)).from_address(out.status.contents.data + out.status.contents.byte_offset)
        return tuple(rank for rank, is_over in enumerate(words[4:]) if is_over) if words[0] & StepFlag.OVERFLOW else ()

    def _taking(self, routing: Routing, step: Step, stream: int | None) -> tuple[dict[str, Any], Any]:
        """A dispatch's outputs by name, and the struct that points at them; on the CPU it always has a status."""
        outputs = self._outputs.of(step, routing._status, stream)
        taken = pointed(_abi.DispatchOut(), outputs)
        if not self._on_cuda:
            if "status" not in outputs:
                taken.status = pointer(routing._status._raw)
            status = taken.status.contents
            # What an earlier step left there is not this one's.
            ctypes.memset(status.data + status.byte_offset, 0, 4)
        return outputs, taken

    def _received_half(self, half: tuple[str, int]) -> None:
        """What was kept may go once nothing that was sent waits for its RECV."""
        self._sent.discard(half)
        if not self._sent:
            self._kept.clear()

    def _forget_sent(self) -> None:
        self._sent.clear()
        self._kept.clear()

    def _end_views(self, by: str, slot: int | None = None) -> None:
        """Ends the views of a slot, or of all."""
        for each in [slot] if slot is not None else list(self._leases):
            if lease := self._leases.pop(each, None):
                lease.end(by)

    def _receive(self, routing: Routing, outputs: dict[str, Any], num_rows: int) -> Received:
        """Makes the outputs of a dispatch that has succeeded visible."""
        lease = self._leases[routing.slot] = Lease(self._handle, routing._handle)
        step = routing._step
        step.received._fill(outputs, lease, step.stream, step.framework, num_rows)
        # What was received stays as long as the caller wants it, not until the next step.
        received, step.received, step.out = step.received, Received(), None
        return received

    def _stream_of(self, stream: Any, framework: str, array: Any) -> int | None:
        """The stream of a call: the one that is named, else the current one of a framework. None on the CPU."""
        if not self._on_cuda:
            return None
        if stream is not None:
            return _cuda.number(stream)
        now = _cuda.current(framework, self.info.device_ordinal)
        return getattr(array, "stream", 0) if now is None else now

    def _next_stream(self, step: Step, stream: Any, framework: str, array: Any) -> int | None:
        """The same for the later calls of a step, which come after its earlier ones whatever streams those were on. RECV is where
        SEND was if that was named."""
        handle = self._stream_of(step.named if stream is None else stream, framework, array)
        if handle is not None:
            _cuda.order(step.stream, handle, self.info.device_ordinal)
            step.stream = handle
        return handle

    def _sums(self, sums: Sums, stream: int | None) -> Any:
        """What takes combine's outputs."""
        if sums.out is None:
            raise TypeError("out is None: combine needs a tensor [T, H], which SEND or BOTH make on the CPU alone")
        arrays = {"tokens": sums.out, "topk_weights": sums.weights_out, "status": sums.status}
        outputs = {name: writable(name, array, stream) for name, array in arrays.items() if array is not None}
        return pointed(_abi.CombineOut(), outputs)


def _int32s(values: Iterable[int]) -> Any:
    numbers = tuple(values)
    return (c_int32 * len(numbers))(*numbers)


def _marked(words: Iterable[int]) -> tuple[int, ...]:
    """The ranks whose bits are set: bit r % 64 of word r / 64."""
    return tuple(64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1)
