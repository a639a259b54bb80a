"""What a call that did not succeed raises: a class for each status, under what was lost."""

from ._abi import Status


class Error(Exception):
    """A call that did not succeed.

    status: what it returned. message: the library's sentence, which names rank, argument, value and limit. ranks: those given up
    on, where a step was lost; those that would have received too many rows, where it overflowed; else empty.
    """

    def __init__(self, status: int, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(status, message, ranks)  # as they came, so that it travels between processes
        known = status in Status._value2member_map_
        self.status: int = Status(status) if known else status
        self.message, self.ranks = message, ranks

    @property
    def name(self) -> str:
        """The status as the header names it, "A2A_TIMEOUT" for instance."""
        return f"A2A_{self.status.name}" if isinstance(self.status, Status) else "unknown status"

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


class CallError(Error):
    """Nothing happened: mend the argument and call again."""


class StepError(Error):
    """The step is void on every rank and its slot closed: `Comm.recover` on the survivors, or close the comm."""


class CommError(Error):
    """The comm is of no more use: `async_error`, `history`, `abort` and `close` remain."""


class InvalidArgumentError(CallError, ValueError):
    """An argument is wrong."""


class UnsupportedError(CallError):
    """Legal, but this build or host cannot do it."""


class BusyError(CallError):
    """Another thread is inside a call on the same comm."""


class OutOfMemoryError(CallError, MemoryError):
    """Memory, file descriptors or memory_limit do not suffice."""


class OverflowError(CallError):
    """An output is too small, or rows exceed max_recv_rows on some rank: on every rank alike, and nothing was received."""


class SystemError(CallError):
    """The operating system refused something that set-up needs."""


class TimeoutError(StepError):
    """A rank did not answer before the deadline."""


class PeerLostError(StepError):
    """A rank died, left or aborted before it sent what was due."""


class MismatchError(StepError):
    """Ranks disagree: on a step, or, at set-up, on the config; nothing was created then."""


class CudaError(CommError):
    """A CUDA call failed."""


class NcclError(CommError):
    """An NCCL call failed."""


class NixlError(CommError):
    """A NIXL call failed."""


class AbortedError(CommError):
    """`Comm.abort` was called."""


class InternalError(CommError):
    """A defect of the library was caught."""


BY_STATUS: dict[int, type[Error]] = {
    Status.INVALID_ARGUMENT: InvalidArgumentError,
    Status.UNSUPPORTED: UnsupportedError,
    Status.BUSY: BusyError,
    Status.OUT_OF_MEMORY: OutOfMemoryError,
    Status.OVERFLOW: OverflowError,
    Status.SYSTEM_ERROR: SystemError,
    Status.TIMEOUT: TimeoutError,
    Status.PEER_LOST: PeerLostError,
    Status.MISMATCH: MismatchError,
    Status.CUDA_ERROR: CudaError,
    Status.NCCL_ERROR: NcclError,
    Status.NIXL_ERROR: NixlError,
    Status.ABORTED: AbortedError,
    Status.INTERNAL: InternalError,
}


def error_of(status: int, message: str, ranks: tuple[int, ...] = ()) -> Error:
    """The exception for a status."""
    return BY_STATUS.get(status, Error)(status, message, ranks)
