"""Finds liba2a.so, opens it once, and makes exceptions of what its calls return."""

import ctypes
import functools
import os
from ctypes import c_int32
from pathlib import Path
from typing import Any

from ._abi import SIGNATURES, Status
from .errors import error_of

NAME = "liba2a.so.0"
HERE = Path(__file__).resolve().parent


class LibraryNotFoundError(ImportError):
    """There is no liba2a.so to load, or it is none that this package knows."""


@functools.cache
def library() -> Any:
    """The library, its functions declared: those that return a status raise `Error` unless it is success."""
    opened, path = _open()
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(opened, name)
        except AttributeError:
            raise LibraryNotFoundError(f"{path} has no {name}: it is not the liba2a that this package is for") from None
        function.restype, function.argtypes = result or c_int32, arguments
        if result is None:
            function.errcheck = _check
    return opened


def version() -> str:
    """The library's version, "0.1.0" for instance."""
    text: bytes = library().a2a_version()
    return text.decode()


def _check(status: int, function: Any, arguments: Any) -> int:
    if status != Status.SUCCESS:
        raise error_of(status, library().a2a_last_error().decode(errors="replace"))
    return status


def _open() -> tuple[ctypes.CDLL, str]:
    """The first there is: A2A_LIBRARY, the wheel's own, the loader's, the build tree's."""
    if named := os.environ.get("A2A_LIBRARY"):
        try:
            return ctypes.CDLL(named), named
        except OSError as error:
            raise LibraryNotFoundError(f"A2A_LIBRARY is {named!r}, which cannot be loaded: {error}") from None
    tree = HERE.parents[2] / "target/release/liba2a.so"
    tried = []
    for path in (str(HERE / NAME), NAME, str(tree)):
        if "/" in path and not os.path.exists(path):
            tried.append(f"{path}: no such file")
            continue
        try:
            return ctypes.CDLL(path), path
        except OSError as error:
            tried.append(str(error))
    raise LibraryNotFoundError(
        "liba2a.so was not found: set A2A_LIBRARY to its path, install the wheel or the library, or build it with `make` "
        f"(tried: {'; '.join(tried)})"
    )
