"""CUDA streams: whose is current, which number it has, and one that waits for another. Imports no framework."""

import ctypes
import functools
import sys
from ctypes import byref, c_int, c_uint, c_void_p
from typing import Any

LEGACY, NOBODY = 1, -1
_LEGACY_NAMES = (0, LEGACY)


def number(stream: Any) -> int:
    """The handle of a stream: a number, or what torch (.cuda_stream), CuPy (.ptr) or others (.__cuda_stream__) call one."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        told = stream.__cuda_stream__
        return int((told() if callable(told) else told)[1])
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(
        f"stream is a {type(stream).__name__}: it must be a handle as a number, or have .cuda_stream, .ptr or .__cuda_stream__"
    )


def framework_of(array: Any) -> str:
    """Whose an array is: the top module of its class, or of a base that has streams, or what a tensor remembers of it."""
    told = getattr(array, "framework", None)
    if isinstance(told, str):
        return told
    modules = [base.__module__.partition(".")[0] for base in type(array).__mro__]
    return next((name for name in modules if name in ("torch", "cupy")), modules[0])


def current(framework: str, ordinal: int) -> int | None:
    """The current stream of a framework on a device; None of one that has none or has not been imported."""
    module = sys.modules.get(framework)
    if module is not None and framework == "torch":
        return int(module.cuda.current_stream(ordinal).cuda_stream)
    if module is not None and framework == "cupy":
        return int(module.cuda.get_current_stream().ptr)
    return None


def consumer(stream: int | None) -> int:
    """The stream that a consumer names in __dlpack__: none is the legacy default one."""
    if stream is None:
        return LEGACY
    if stream == 0 or stream < NOBODY:
        raise ValueError(f"stream is {stream}: DLPack knows -1, 1, 2 and handles on CUDA (0 could mean either default stream)")
    return stream


def order(after: int, waits: int, ordinal: int) -> None:
    """Has a stream wait for what another has been given so far."""
    if after == waits or after in _LEGACY_NAMES and waits in _LEGACY_NAMES:
        return
    driver, context, event = _driver(), c_void_p(), c_void_p()
    _check(driver.cuDevicePrimaryCtxRetain(byref(context), c_int(ordinal)), "cuDevicePrimaryCtxRetain")
    try:
        _check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
        try:
            _check(driver.cuEventCreate(byref(event), c_uint(2)), "cuEventCreate")  # CU_EVENT_DISABLE_TIMING
            try:
                _check(driver.cuEventRecord(event, c_void_p(after)), "cuEventRecord")
                _check(driver.cuStreamWaitEvent(c_void_p(waits), event, c_uint(0)), "cuStreamWaitEvent")
            finally:
                driver.cuEventDestroy_v2(event)  # it goes once it has been waited for
        finally:
            driver.cuCtxPopCurrent_v2(byref(c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(c_int(ordinal))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, call: str) -> None:
    if result != 0:
        raise RuntimeError(f"{call} failed: CUDA error {result}, while one stream was to wait for another")
