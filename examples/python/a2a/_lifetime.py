"""How long the library's memory must stay: until its handle is closed and nothing outside looks into it any more."""

import threading
import warnings
from collections.abc import Callable
from ctypes import c_void_p

from .errors import Error


class Handle:
    """A handle of the library's. `close` destroys it, or, while views of its memory are held outside, has the last one do so."""

    def __init__(self, what: str, pointer: c_void_p, destroy: Callable[[c_void_p], object],
                 leave: Callable[[c_void_p], object] | None = None):
        """leave: what tells the peers at once if destroying has to wait."""
        self.what, self.closed = what, False
        self._pointer, self._destroy, self._leave = pointer, destroy, leave
        self._held = 0
        self._lock = threading.RLock()  # a collection may drop a view of ours in the middle of anything

    @property
    def pointer(self) -> c_void_p:
        if self.closed:
            raise ValueError(f"{self.what} is closed")
        return self._pointer

    def hold(self) -> None:
        with self._lock:
            if self.closed:
                raise BufferError(f"this view has ended: {self.what} is closed")
            self._held += 1

    def drop(self) -> None:
        with self._lock:
            self._held -= 1
            last = self.closed and self._held == 0
        if last:
            self._destroy(self._pointer)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed, held = True, self._held
        if not held:
            self._destroy(self._pointer)
        elif self._leave is not None:
            try:
                self._leave(self._pointer)
            except Error:
                pass  # it has failed before, and the peers know

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.close()
            if self._leave is not None:
                warnings.warn(f"{self.what} was never closed", ResourceWarning, source=self)


class Lease:
    """The time in which the views of one step may be looked into: from dispatch RECV to combine SEND, or the slot's next dispatch."""

    def __init__(self, comm: Handle, routing: Handle):
        self._handles = comm, routing
        self._over = ""

    def end(self, by: str) -> None:
        self._over = self._over or by

    def check(self) -> None:
        """Refuses what would look at memory that is not the step's any more."""
        if self._over:
            raise BufferError(f"this view has ended: {self._over}. Copy what is needed longer before that")


class Hold:
    """Keeps the memory of a lease that has not ended where it is, as long as this object lives."""

    def __init__(self, lease: Lease):
        self._held: list[Handle] = []
        lease.check()
        for handle in lease._handles:
            handle.hold()
            self._held.append(handle)

    def __del__(self) -> None:
        for handle in self._held:
            handle.drop()
