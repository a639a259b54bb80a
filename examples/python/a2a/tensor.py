"""Tensors: memory with a type, a shape and strides, on the host or on a GPU, that goes in and out by DLPack."""

import ctypes
import itertools
import struct as packing
from collections.abc import Iterator, Sequence
from ctypes import c_int64
from typing import Any, NamedTuple, Protocol

from . import _abi, _cuda, _dlpack
from ._lifetime import Hold, Lease


class SupportsDLPack(Protocol):
    """An array of numpy, torch, CuPy, JAX or another that speaks DLPack."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class ElementType(NamedTuple):
    """DLPack's code, bits and lanes of an element."""

    code: int
    bits: int
    lanes: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return (self.bits * self.lanes + 7) // 8

    @property
    def name(self) -> str:
        """As numpy and ml_dtypes name it, "bfloat16" for instance."""
        return _NAMES.get(self, f"code {self.code}, {self.bits} bits, {self.lanes} lanes")

    def __str__(self) -> str:
        return self.name


int8, int16, int32, int64 = (ElementType(0, bits) for bits in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (ElementType(1, bits) for bits in (8, 16, 32, 64))
float16, float32, float64 = (ElementType(2, bits) for bits in (16, 32, 64))
bfloat16 = ElementType(4, 16)
bool_ = ElementType(6, 8)
float8_e4m3fn = ElementType(10, 8)
float8_e5m2 = ElementType(12, 8)
float8_e8m0fnu = ElementType(14, 8)

_NAMES = {
    int8: "int8", int16: "int16", int32: "int32", int64: "int64", uint8: "uint8", uint16: "uint16", uint32: "uint32",
    uint64: "uint64", float16: "float16", float32: "float32", float64: "float64", bfloat16: "bfloat16", bool_: "bool",
    float8_e4m3fn: "float8_e4m3fn", float8_e5m2: "float8_e5m2", float8_e8m0fnu: "float8_e8m0fnu",
}
BY_DTYPE = {
    _abi.Dtype.BF16: bfloat16, _abi.Dtype.F16: float16, _abi.Dtype.F32: float32, _abi.Dtype.F8_E4M3: float8_e4m3fn,
    _abi.Dtype.U8: uint8,
}
_BY_NAME = {name: element for element, name in _NAMES.items()} | {dtype.name.lower(): one for dtype, one in BY_DTYPE.items()}
# How Python's struct names elements; and memoryview, which has no half precision: 16-bit floats go as their bits.
_FORMATS = {
    int8: "b", int16: "h", int32: "i", int64: "q", uint8: "B", uint16: "H", uint32: "I", uint64: "Q", float16: "e",
    float32: "f", float64: "d", bool_: "?",
}
_IN_MEMORYVIEW = _FORMATS | {float16: "H", bfloat16: "H"}


def element_type(dtype: Any) -> ElementType:
    """The element type that an ElementType, a config's Dtype, a name or a dtype of numpy, ml_dtypes or torch means."""
    if isinstance(dtype, ElementType):
        return dtype
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    known = _BY_NAME.get(name.rpartition(".")[2].lower())
    if known is None:
        raise ValueError(f"dtype is {dtype!r}, known are {', '.join(_BY_NAME)}")
    return known


class Tensor:
    """Memory with an element type, a shape and strides, which somebody keeps: an array, a comm, or this object.

    A view of a step looks into memory of its comm, which stays as long as somebody has taken the view by DLPack or memoryview.
    What stands there is the step's until this rank's combine SEND or the slot's next dispatch: then the view has ended, and is
    given to nobody any more.
    """

    __slots__ = ("_lease", "_raw", "framework", "readonly", "stream")

    def __init__(
        self, raw: _abi.Tensor, keeper: Any, *, readonly: bool = False, lease: Lease | None = None, stream: int = 0,
        framework: str = "",
    ):
        """keeper: what keeps the memory, shape and strides of raw. stream: where, on CUDA, what stands in the memory is made.
        framework: the module whose arrays it is used with, and whose current stream counts, "torch" for instance."""
        self._raw, self._lease = raw, lease
        raw.keeper = keeper
        self.readonly, self.stream, self.framework = readonly, stream, framework

    @property
    def dtype(self) -> ElementType:
        dtype = self._raw.dtype
        return ElementType(dtype.code, dtype.bits, dtype.lanes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._raw.shape[: self._raw.ndim])

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        if self._raw.strides:
            return tuple(self._raw.strides[: self._raw.ndim])
        return _compact(self.shape)

    @property
    def ndim(self) -> int:
        return self._raw.ndim

    @property
    def device(self) -> tuple[int, int]:
        """DLPack's device type (1 CPU, 2 CUDA) and the ordinal."""
        return self._raw.device.device_type, self._raw.device.device_id

    @property
    def address(self) -> int:
        """Of the first element."""
        return (self._raw.data or 0) + self._raw.byte_offset

    @property
    def nbytes(self) -> int:
        """Of the elements, without what lies between rows."""
        return _product(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        if not self._raw.ndim:
            raise TypeError("this tensor has no dimensions")
        return self.shape[0]

    def __repr__(self) -> str:
        kind, ordinal = self.device
        where = "cpu" if kind == _dlpack.CPU else f"cuda:{ordinal}" if kind == _dlpack.CUDA else f"device {kind}:{ordinal}"
        return f"a2a.Tensor({self.dtype}{list(self.shape)}, {where})"

    def view(self, dtype: Any) -> "Tensor":
        """The same memory as elements of another type of the same width: uint8 for float8_e4m3fn, which numpy has not."""
        element = element_type(dtype)
        if element.itemsize != self.dtype.itemsize:
            raise ValueError(f"{self.dtype} has {self.dtype.itemsize} bytes, {element} has {element.itemsize}")
        raw = _abi.Tensor.from_buffer_copy(self._raw)
        raw.dtype = _abi.TensorDtype(*element)
        return Tensor(
            raw, self, readonly=self.readonly, lease=self._lease, stream=self.stream, framework=self.framework
        )

    # ------------------------------------------------------------------------------------------------------ out, by DLPack

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None, copy: bool | None = None,
    ) -> Any:
        hold = self._hold()
        if dl_device is not None and tuple(dl_device) != self.device:
            raise BufferError(f"the tensor lies on device {self.device}, it is not brought to {tuple(dl_device)}")
        if self.device[0] in _dlpack.ON_STREAMS:
            if copy:
                raise BufferError("memory of a GPU is not copied here: take it as it is, and copy that")
            waits = _cuda.consumer(stream)
            if waits != _cuda.NOBODY:
                _cuda.order(self.stream, waits, self.device[1])
        elif stream is not None:
            raise ValueError(f"stream is {stream}: there are none on device type {self.device[0]}, it must be None")
        source = self.copy() if copy else self
        versioned = max_version is not None and max_version[0] >= _dlpack.VERSION[0]
        if source.readonly and not versioned:
            raise BufferError("the tensor is read-only, which only DLPack 1.0 and later can say: ask with max_version=(1, 0)")
        flags = (_dlpack.READ_ONLY if source.readonly else 0) | (_dlpack.IS_COPIED if copy else 0)
        return _dlpack.give(source._raw, (source, hold), flags if versioned else None)

    def numpy(self) -> Any:
        """The memory as an array of numpy, nothing copied; types that numpy has not are those of ml_dtypes."""
        import numpy

        if self.dtype in _FORMATS:
            return numpy.from_dlpack(self)
        import ml_dtypes  # type: ignore[import-not-found, unused-ignore]

        return numpy.from_dlpack(self.view(f"uint{self.dtype.bits}")).view(getattr(ml_dtypes, self.dtype.name))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"{self!r} is not brought to {dtype} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    # ------------------------------------------------------------------------------------------ out, to Python; CPU memory

    def memoryview(self) -> memoryview:
        """The memory itself. The tensor must be compact; floats of 16 bits go as uint16, those of 8 and what Python has not as bytes.
        Without elements it has no shape, as a memoryview cannot have one then."""
        view, letter = self._bytes(), _IN_MEMORYVIEW.get(self.dtype, "B")
        if self.nbytes and packing.calcsize(letter) == self.dtype.itemsize:
            view = view.cast(letter, self.shape)
        shown: memoryview = view.toreadonly() if self.readonly else view
        return shown

    def tobytes(self) -> bytes:
        """A copy of the elements, row by row."""
        return b"".join(self._runs())

    def tolist(self) -> Any:
        """A copy as nested lists of Python's numbers."""
        dtype, shape = self.dtype, self.shape
        data = self.tobytes()
        numbers: Any
        if dtype == bfloat16:
            numbers = [packing.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
        elif dtype == float8_e4m3fn:
            numbers = [_e4m3(code) for code in data]
        elif dtype in _FORMATS:
            numbers = list(packing.unpack(f"{len(data) // dtype.itemsize}{_FORMATS[dtype]}", data))
        else:
            raise TypeError(f"Python has no numbers for {dtype}: take tobytes()")
        for size in reversed(shape[1:]):
            numbers = [numbers[i : i + size] for i in range(0, len(numbers), size)] if size else [[] for _ in range(shape[0])]
        return numbers if shape else numbers[0]

    def copy(self) -> "Tensor":
        """A compact copy in memory of its own, which nothing ends."""
        return empty(self.shape, self.dtype).copy_from(self)

    def copy_from(self, array: Any) -> "Tensor":
        """Copies the elements of another tensor or array of the same shape and type into this compact one."""
        source = as_tensor(array)
        if (source.shape, source.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{source!r} does not fit into {self!r}")
        if self.readonly:
            raise BufferError("the tensor is read-only")
        to, at = self._bytes(), 0
        for run in source._runs():
            to[at : at + len(run)] = run
            at += len(run)
        return self

    # --------------------------------------------------------------------------------------------------------------- inside

    def _hold(self) -> Hold | None:
        """What keeps the memory in its place while it is looked at; refused for a view that has ended."""
        return None if self._lease is None else Hold(self._lease)

    def _hold_on_host(self) -> Hold | None:
        if self.device[0] not in (_dlpack.CPU, _dlpack.CUDA_HOST):
            raise BufferError(f"{self!r} is not in the host's memory: copy it there by its framework")
        return self._hold()

    def _bytes(self) -> Any:
        """The memory of a compact tensor as a memoryview of bytes, which keeps it."""
        hold, size = self._hold_on_host(), self.nbytes
        if size and self._inner() != len(self.shape):
            raise BufferError(f"the tensor has strides {self.strides} over {self.shape}: this needs one that is compact")
        memory: Any = (ctypes.c_ubyte * size).from_address(self.address) if size else (ctypes.c_ubyte * 0)()
        memory.keeper = self, hold
        return memoryview(memory).cast("B")

    def _inner(self) -> int:
        """How many of the dimensions, counted from the last, lie together without gaps."""
        together, inner = 1, 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if stride != together and size != 1:
                break
            together *= size
            inner += 1
        return inner

    def _runs(self) -> Iterator[bytes]:
        """Copies of the elements in order, as many at a time as lie together."""
        hold = self._hold_on_host()
        shape, strides, itemsize = self.shape, self.strides, self.dtype.itemsize
        outer = len(shape) - self._inner()
        run = _product(shape[outer:]) * itemsize
        for index in itertools.product(*map(range, shape[:outer])) if self.nbytes else ():
            yield ctypes.string_at(self.address + sum(i * step for i, step in zip(index, strides)) * itemsize, run)
        del hold  # until here


def empty(shape: int | Sequence[int], dtype: Any) -> Tensor:
    """Host memory of one's own, compact, 64-byte aligned (rows of tokens need 16), which lives as long as the tensor. Zeros."""
    element = element_type(dtype)
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    memory = bytearray(_product(sizes) * element.itemsize + 64)
    anchor = ctypes.c_char.from_buffer(memory)
    return _describe(-(-ctypes.addressof(anchor) // 64) * 64, sizes, None, element, anchor)


def from_list(values: Any, dtype: Any) -> Tensor:
    """Nested lists of Python's numbers as a tensor of its own, for who has no numpy."""
    element, sizes, numbers = element_type(dtype), [], values
    if element not in _FORMATS:
        raise TypeError(f"Python does not write {element}: take another type, or a tensor of a framework")
    while isinstance(numbers, (list, tuple)):
        sizes.append(len(numbers))
        numbers = numbers[0] if numbers else None
    flat = values if sizes else [values]
    for size in sizes[1:]:
        if any(len(row) != size for row in flat):
            raise ValueError(f"the rows of {values!r} have different lengths")
        flat = [number for row in flat for number in row]
    made = empty(sizes, element)
    made._bytes()[:] = packing.pack(f"{len(flat)}{_FORMATS[element]}", *flat)
    return made


def strided(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Host memory of one's own by another shape and strides (in elements); the caller says that it is there."""
    return _describe(tensor.address, tuple(shape), tuple(strides), tensor.dtype, tensor)


def as_tensor(array: Any, dtype: Any = None, *, stream: Any = None) -> Tensor:
    """An array as it lies, nothing copied: a Tensor, what speaks DLPack, or what has a buffer (ctypes arrays, bytearrays, array.array).

    dtype: what the elements are if the array says something else of the same width: bfloat16 for numpy's uint16. stream: what
    will use it, on CUDA; it waits for what the array's framework has still to do. bytes and other read-only buffers are copied.
    """
    if isinstance(array, Tensor):
        tensor = array
        tensor._hold()
        if stream is not None and tensor.device[0] in _dlpack.ON_STREAMS:
            _cuda.order(tensor.stream, _cuda.number(stream), tensor.device[1])
    elif hasattr(array, "__dlpack__"):
        tensor = _taken(array, stream)
    else:
        tensor = _from_buffer(array)
    return tensor if dtype is None else tensor.view(dtype)


# Types of arrays that know no DLPack 1.0.
_old: set[type] = set()


def _taken(array: Any, stream: Any) -> Tensor:
    """What a producer tells."""
    arguments: dict[str, Any] = {}
    framework, used = "", 0
    kind, ordinal = array.__dlpack_device__()
    if kind in _dlpack.ON_STREAMS:
        framework = _cuda.framework_of(array)
        used = (_cuda.current(framework, ordinal) or 0) if stream is None else _cuda.number(stream)
        arguments["stream"] = used or _cuda.LEGACY
    try:
        capsule = _capsule(array, arguments)
    except BufferError:
        # An array of numpy with a type of ml_dtypes, which numpy does not tell by DLPack.
        element = _BY_NAME.get(getattr(getattr(array, "dtype", None), "name", ""))
        if element is None or element in _FORMATS or not hasattr(array, "view"):
            raise
        return _taken(array.view(f"uint{element.bits}"), stream).view(element)
    raw, readonly = _dlpack.read(capsule)
    return Tensor(raw, capsule, readonly=readonly, stream=used, framework=framework)


def _capsule(array: Any, arguments: dict[str, Any]) -> Any:
    if type(array) not in _old:
        try:
            return array.__dlpack__(max_version=_dlpack.VERSION, **arguments)
        except TypeError:
            _old.add(type(array))
    return array.__dlpack__(**arguments)


def _from_buffer(array: Any) -> Tensor:
    try:
        view: Any = memoryview(array)
    except TypeError:
        raise TypeError(
            f"a {type(array).__name__} is no tensor: it has neither __dlpack__ (numpy, torch, CuPy, JAX) nor a buffer"
        ) from None
    letter = view.format.lstrip("@=<")
    letter = {"l": "q", "L": "Q", "c": "B"}.get(letter, letter)
    element = next((element for element, known in _FORMATS.items() if known == letter), None)
    if element is None or element.itemsize != view.itemsize or not view.c_contiguous:
        raise ValueError(f"a buffer of format {view.format!r} with strides {view.strides} is no compact tensor of known elements")
    if view.nbytes == 0:
        made = empty(view.shape, element)
        made.readonly = view.readonly
        return made
    if view.readonly:
        memory: Any = (ctypes.c_char * view.nbytes).from_buffer_copy(view)
    else:
        memory = (ctypes.c_char * view.nbytes).from_buffer(view)
    made = _describe(ctypes.addressof(memory), view.shape, None, element, memory)
    made.readonly = view.readonly
    return made


def _describe(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, element: ElementType, keeper: Any
) -> Tensor:
    """A tensor over host memory."""
    sizes = (c_int64 * len(shape))(*shape)
    steps = (c_int64 * len(shape))(*(strides if strides is not None else _compact(shape)))
    raw = _abi.Tensor(
        data=address, device=_abi.TensorDevice(_dlpack.CPU, 0), ndim=len(shape), dtype=_abi.TensorDtype(*element), shape=sizes,
        strides=steps,
    )
    return Tensor(raw, keeper)


def view_of(raw: _abi.Tensor, lease: Lease, stream: int, framework: str) -> Tensor:
    """A view that the library has filled in: the shape it points at is the routing's, which the next dispatch changes."""
    made = _abi.Tensor.from_buffer_copy(raw)
    made.shape = (c_int64 * raw.ndim)(*raw.shape[: raw.ndim])
    made.strides = (c_int64 * raw.ndim)(*raw.strides[: raw.ndim])
    return Tensor(made, raw.keeper, lease=lease, stream=stream, framework=framework)


def _compact(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps: list[int] = []
    step = 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _e4m3(code: int) -> float:
    """The value of a code of float8_e4m3fn."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return sign * float("nan")
    return sign * (mantissa / 512 if exponent == 0 else (8 + mantissa) / 8 * 2.0 ** (exponent - 7))
