"""The library's log lines."""

import atexit
from collections.abc import Callable
from typing import Any

from . import _abi
from ._abi import LogLevel
from ._library import library

# Every callback there has been: a line may still be on its way to one that was replaced.
_callbacks: list[Any] = []


def set_log_callback(callback: Callable[[LogLevel, str], None] | None) -> None:
    """Sends the library's log lines, of the whole process, to a function that calls nothing of the library. None: to standard
    error again, if A2A_LOG says so. It is called on any thread that logs; what it raises is printed."""
    if callback is None:
        library().a2a_set_log_callback(_abi.LOG_FN(), None)
        return

    def receive(level: int, line: bytes, _user: int) -> None:
        callback(LogLevel(level), line.decode(errors="replace"))

    if not _callbacks:
        atexit.register(set_log_callback, None)  # the library's threads outlive the interpreter
    _callbacks.append(_abi.LOG_FN(receive))
    library().a2a_set_log_callback(_callbacks[-1], None)
