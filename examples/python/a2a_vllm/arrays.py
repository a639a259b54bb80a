"""Tensors of whatever library the engine has: what is given in torch comes back in torch, numpy gives numpy, CuPy gives CuPy.

Nothing here copies unless its name says so. torch and CuPy are used where a caller's tensor is theirs, and never imported otherwise.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from typing import Any

import a2a

# Element types that numpy has from ml_dtypes, if at all.
OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn")
# A tensor, a dtype and a device of the caller's library.
Tensor = Any
Dtype = Any
Device = Any


class NumpyArrays:
    """numpy, and CuPy, which has the same names. What numpy itself lacks (bfloat16, float8) are ml_dtypes' types."""

    def __init__(self, module):
        self.np = module

    def dtype(self, name: str) -> Dtype:
        if name in OF_ML_DTYPES:
            return self.np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        return self.np.dtype(name)

    def name_of(self, array: Tensor) -> str:
        return array.dtype.name

    def size_of(self, array: Tensor) -> int:
        return array.dtype.itemsize

    def empty(self, shape: tuple[int, ...], dtype: Dtype, device: Device = None) -> Tensor:
        return self.np.empty(shape, dtype)

    def device_of(self, array: Tensor) -> Device:
        return None

    def device(self, kind: int, ordinal: int) -> Device:
        """Of DLPack's device type and an ordinal."""
        return None

    def from_list(self, values: list, name: str, device: Device = None) -> Tensor:
        return self.np.asarray(values, self.dtype(name))

    def arange(self, n: int, device: Device = None) -> Tensor:
        return self.np.arange(n)

    def take(self, tensor: a2a.Tensor) -> Tensor:
        """The library's memory as an array."""
        return tensor.numpy() if self.np.__name__ == "numpy" else self.np.from_dlpack(tensor)

    def cast(self, array: Tensor, name: str) -> Tensor:
        return array.astype(self.dtype(name), copy=False)

    def ones_like(self, array: Tensor) -> Tensor:
        return self.np.ones_like(array)

    def where(self, condition: Tensor, then: Tensor, otherwise: Any) -> Tensor:
        return self.np.where(condition, then, then.dtype.type(otherwise))

    def stack(self, columns: list[Tensor]) -> Tensor:
        """[n, len(columns)]"""
        return self.np.stack(columns, 1)

    def copy(self, out: Tensor, values: Tensor) -> None:
        out[...] = values

    def compact(self, array: Tensor) -> Tensor:
        """The array itself if its last dimension is contiguous, else a compact copy."""
        contiguous = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
        return array if contiguous else self.np.ascontiguousarray(array)

    def address(self, array: Tensor) -> int:
        return array.ctypes.data if self.np.__name__ == "numpy" else array.data.ptr


class TorchArrays:
    """torch, for tensors on any of its devices."""

    def __init__(self, module):
        self.torch = module

    def dtype(self, name: str) -> Dtype:
        return getattr(self.torch, name)

    def name_of(self, array: Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")

    def size_of(self, array: Tensor) -> int:
        return array.dtype.itemsize

    def empty(self, shape: tuple[int, ...], dtype: Dtype, device: Device = None) -> Tensor:
        return self.torch.empty(shape, dtype=dtype, device=device)

    def device_of(self, array: Tensor) -> Device:
        return array.device

    def device(self, kind: int, ordinal: int) -> Device:
        return self.torch.device("cuda", ordinal) if kind == a2a.Device.CUDA else self.torch.device("cpu")

    def from_list(self, values: list, name: str, device: Device = None) -> Tensor:
        return self.torch.tensor(values, dtype=self.dtype(name), device=device)

    def arange(self, n: int, device: Device = None) -> Tensor:
        return self.torch.arange(n, device=device)

    def take(self, tensor: a2a.Tensor) -> Tensor:
        return self.torch.from_dlpack(tensor)

    def cast(self, array: Tensor, name: str) -> Tensor:
        return array.to(self.dtype(name))

    def ones_like(self, array: Tensor) -> Tensor:
        return self.torch.ones_like(array)

    def where(self, condition: Tensor, then: Tensor, otherwise: Any) -> Tensor:
        return self.torch.where(condition, then, otherwise)

    def stack(self, columns: list[Tensor]) -> Tensor:
        return self.torch.stack(columns, 1)

    def copy(self, out: Tensor, values: Tensor) -> None:
        out.copy_(values)

    def compact(self, array: Tensor) -> Tensor:
        contiguous = array.shape[-1] <= 1 or array.stride(-1) == 1
        return array if contiguous else array.contiguous()

    def address(self, array: Tensor) -> int:
        return array.data_ptr()


Arrays = NumpyArrays | TorchArrays


@functools.cache
def _arrays(library: str) -> Arrays:
    return TorchArrays(sys.modules["torch"]) if library == "torch" else NumpyArrays(sys.modules[library])


@functools.cache
def _of_class(kind: type) -> Arrays:
    """By the class or the first of its bases that is a library's own: engines and torch subclass tensors."""
    for base in kind.__mro__:
        if (library := base.__module__.partition(".")[0]) in ("torch", "numpy", "cupy"):
            return _arrays(library)
    raise TypeError(f"a2a_vllm: a tensor of {kind.__module__}.{kind.__qualname__}: it takes torch's, numpy's and CuPy's")


def of(array: Tensor) -> Arrays:
    """The library of an array."""
    return _of_class(type(array))  # type: ignore[arg-type]  # any class may be a key


def default() -> Arrays:
    """The library for a result that no argument tells: torch where the engine uses it, else numpy."""
    if "torch" not in sys.modules:
        importlib.import_module("numpy")
    return _arrays("torch" if "torch" in sys.modules else "numpy")


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of one's own, of the library, type and device of another."""
    library = of(like)
    return library.empty(shape, like.dtype, library.device_of(like))


def synchronize(kind: int, ordinal: int) -> None:
    """Waits for all that this process has given a device, which is DLPack's device type and an ordinal; nothing on the CPU. A step that
    has lost a rank ends at its deadline, and so does this."""
    if kind != a2a.Device.CUDA:
        return
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize(ordinal)
    elif cupy is not None:
        cupy.cuda.Device(ordinal).synchronize()


def rows(array: Tensor) -> Tensor:
    """[n] or [n, *] as the library takes rows: of two dimensions at most, each row contiguous."""
    if len(array.shape) > 2:
        array = array.reshape(array.shape[0], row_bytes(array) // of(array).size_of(array))
    return of(array).compact(array) if len(array.shape) == 2 else array


def same_memory(rows: Tensor, array: Tensor) -> bool:
    """Whether what `rows` gave is the array's own memory, and no copy."""
    return of(array).address(rows) == of(array).address(array)


def row_bytes(array: Tensor) -> int:
    """Bytes of a row of [n] or [n, *]."""
    return math.prod(array.shape[1:]) * of(array).size_of(array)


def row_fields(tokens: Tensor, result_bytes: int | None = None) -> dict:
    """The config fields of a comm that dispatches such rows, of any type, and combines rows of `result_bytes`; None: as many as the
    tokens have, but 16 bits a value where tokens are quantised (uint8: two values a byte)."""
    library = of(tokens)
    if result_bytes is None:
        result_bytes = row_bytes(tokens) * (1 if library.size_of(tokens) > 1 else 4 if library.name_of(tokens) == "uint8" else 2)
    return dict(token_dtype=a2a.Dtype.U8, max_hidden=row_bytes(tokens), combine_dtype=a2a.Dtype.BF16, combine_hidden=result_bytes // 2)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """[n, H]: [n, K, H] times [n, K], summed over k in float32."""
    library = of(values)
    wide = library.cast(values, "float32")
    if weights is not None:
        wide = wide * weights[:, :, None]
    return library.cast(wide.sum(1), library.name_of(values))
