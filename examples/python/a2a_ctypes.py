"""liba2a's C ABI for ctypes: the structs of a2a.h field by field, and the library with its signatures.

Needs nothing but Python. `load()` gives the library; every call that returns a status raises `Error` with the
library's sentence unless it succeeds. tests/python/test_layout.py holds this file against the header.
"""

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint64, c_void_p, pointer
from pathlib import Path

SUCCESS, INVALID_ARGUMENT, UNSUPPORTED, BUSY, OUT_OF_MEMORY, OVERFLOW, SYSTEM_ERROR = range(7)
TIMEOUT, PEER_LOST, MISMATCH = 16, 17, 18
CUDA_ERROR, NCCL_ERROR, NIXL_ERROR, ABORTED, INTERNAL = range(32, 37)
(
    BACKEND_AUTO, BACKEND_ALLGATHER_REDUCESCATTER, BACKEND_HIGH_THROUGHPUT, BACKEND_LOW_LATENCY,
    BACKEND_NVLINK_ONE_SIDED, BACKEND_NVLINK_TWO_SIDED, BACKEND_NIXL_ELASTIC,
) = range(7)
BACKEND_UNKNOWN = -1
TRANSPORT_AUTO, TRANSPORT_WINDOW, TRANSPORT_NCCL, TRANSPORT_NIXL = range(4)
DEVICE_CPU, DEVICE_CUDA = 1, 2
DTYPE_DEFAULT, DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_F8_E4M3, DTYPE_U8 = range(6)
LAYOUT_AUTO, LAYOUT_GATHERED, LAYOUT_RANK_MAJOR, LAYOUT_FLAT, LAYOUT_EXPERT_PADDED, LAYOUT_EXPERT_CONTIGUOUS = range(6)
QUANT_NONE, QUANT_FP8_F32_SCALES, QUANT_FP8_UE8M0_SCALES = range(3)
SCALES_ROW, SCALES_COLUMN = range(2)
PLACEMENT_CONTIGUOUS, PLACEMENT_TABLE = range(2)
OVERFLOW_ERROR, OVERFLOW_DROP = range(2)
BOOTSTRAP_UNIQUE_ID, BOOTSTRAP_ALLGATHER = range(2)
CONFIG_REMOTE, CONFIG_DEGRADE = 1, 2
PHASE_BOTH, PHASE_SEND, PHASE_RECV = range(3)
DISPATCH_HOST_COUNTS, DISPATCH_ZERO_PADDING, DISPATCH_UNIFORM, DISPATCH_REUSE = 1, 2, 4, 8
COMBINE_ACCUMULATE, COMBINE_NO_WEIGHTS, COMBINE_NCCL_SUM = 1, 2, 4
STEP_BAD_ID, STEP_DROPPED, STEP_VOID, STEP_OVERFLOW, STEP_DEGRADED = 1, 2, 4, 8, 16
LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG = range(1, 5)
MAX_EXTRAS, MAX_TOPK, MAX_RANKS = 8, 32, 1024

# DLPack's (code, bits) of an element type.
INT32, INT64, UINT8, FLOAT16, FLOAT32, BFLOAT16 = (0, 32), (0, 64), (1, 8), (2, 16), (2, 32), (4, 16)
FLOAT8_E4M3 = (10, 8)


class UniqueId(ctypes.Structure):
    _fields_ = [("bytes", c_uint8 * 128)]


class TensorDevice(ctypes.Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class TensorDtype(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(ctypes.Structure):
    """DLPack's DLTensor. `Tensor()` is an output that becomes a view."""

    _fields_ = [
        ("data", c_void_p),
        ("device", TensorDevice),
        ("ndim", c_int32),
        ("dtype", TensorDtype),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]

    @classmethod
    def of(cls, memory, dtype, *shape):
        """A compact tensor over a ctypes array, which is kept alive."""
        tensor = cls(
            data=ctypes.addressof(memory),
            device=TensorDevice(DEVICE_CPU, 0),
            ndim=len(shape),
            dtype=TensorDtype(*dtype, 1),
            shape=(c_int64 * len(shape))(*shape),
        )
        tensor.memory = memory
        return tensor

    @classmethod
    def from_dlpack(cls, array):
        """The DLTensor that an array of numpy, torch, CuPy or JAX describes itself with; the array is kept alive."""
        capsule = array.__dlpack__()
        name = ctypes.pythonapi.PyCapsule_GetName
        name.restype, name.argtypes = c_char_p, [ctypes.py_object]
        content = ctypes.pythonapi.PyCapsule_GetPointer
        content.restype, content.argtypes = c_void_p, [ctypes.py_object, c_char_p]
        # DLManagedTensor begins with the DLTensor; in DLManagedTensorVersioned four words come first.
        offset = {b"dltensor": 0, b"dltensor_versioned": 32}[name(capsule)]
        tensor = cls.from_address(content(capsule, name(capsule)) + offset)
        tensor.memory = (array, capsule)
        return tensor

    def typed(self, dtype):
        """The same bytes as another type of the same width: numpy has uint8 for what is FLOAT8_E4M3 to liba2a."""
        assert self.dtype.bits == dtype[1]
        tensor = Tensor.from_buffer_copy(self)
        tensor.dtype = TensorDtype(*dtype, 1)
        tensor.memory = self
        return tensor

    def sizes(self):
        return self.shape[: self.ndim]

    def steps(self):
        """Strides in elements."""
        if self.strides:
            return self.strides[: self.ndim]
        steps = [1]
        for size in reversed(self.sizes()[1:]):
            steps.insert(0, steps[0] * size)
        return steps[: self.ndim]

    def address(self, *index):
        """Where the element at an index (or the row, with one number less) lies."""
        offset = sum(i * step for i, step in zip(index, self.steps()))
        return self.data + self.byte_offset + offset * self.dtype.bits // 8


class Sized(ctypes.Structure):
    """A struct that begins with its own size: set here, the rest zero. Tensors are pointed at."""

    def __init__(self, **fields):
        fields = {name: pointer(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


ALLGATHER_FN = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t, c_void_p)
LOG_FN = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Config(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("max_ranks", c_int32),
        ("ranks_per_device", c_int32),
        ("device", c_int32),
        ("device_ordinal", c_int32),
        ("backend", c_int32),
        ("transport", c_int32),
        ("layout", c_int32),
        ("num_experts", c_int32),
        ("placement", c_int32),
        ("max_topk", c_int32),
        ("max_hidden", c_int32),
        ("max_tokens", c_int32),
        ("token_dtype", c_int32),
        ("combine_dtype", c_int32),
        ("combine_hidden", c_int32),
        ("quant", c_int32),
        ("scale_layout", c_int32),
        ("max_scale_bytes", c_int32),
        ("extra_row_bytes", c_int32 * MAX_EXTRAS),
        ("num_slots", c_int32),
        ("expert_alignment", c_int32),
        ("overflow", c_int32),
        ("max_sms", c_int32),
        ("max_recv_rows", c_int64),
        ("setup_timeout_ms", c_int64),
        ("first_step_timeout_ms", c_int64),
        ("timeout_ms", c_int64),
        ("memory_limit", c_uint64),
        ("flags", c_uint64),
        ("expert_owner", POINTER(c_int32)),
        ("bootstrap", c_int32),
        ("fifo_rows", c_int32),
        ("unique_id", UniqueId),
        ("allgather", ALLGATHER_FN),
        ("allgather_user", c_void_p),
        ("nccl_comm", c_void_p),
    ]


class Memory(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("window_bytes", c_uint64),
        ("control_bytes", c_uint64),
        ("slot_bytes", c_uint64),
        ("private_bytes", c_uint64),
        ("routing_bytes", c_uint64),
        ("total_bytes", c_uint64),
        ("pinned_bytes", c_uint64),
    ]


class Info(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("max_ranks", c_int32),
        ("device", c_int32),
        ("device_ordinal", c_int32),
        ("backend", c_int32),
        ("transport", c_int32),
        ("layout", c_int32),
        ("num_experts", c_int32),
        ("first_expert", c_int32),
        ("num_local_experts", c_int32),
        ("max_topk", c_int32),
        ("max_hidden", c_int32),
        ("max_tokens", c_int32),
        ("num_slots", c_int32),
        ("max_sms", c_int32),
        ("row_capacity", c_int64),
        ("window_bytes", c_uint64),
    ]


class DispatchIn(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", POINTER(Tensor)),
        ("topk_ids", POINTER(Tensor)),
        ("topk_weights", POINTER(Tensor)),
        ("scales", POINTER(Tensor)),
        ("extras", POINTER(Tensor) * MAX_EXTRAS),
        ("rank_tokens", POINTER(c_int32)),
        ("max_tokens", c_int32),
        ("phase", c_int32),
        ("flags", c_uint64),
        ("max_sms", c_int32),
        ("reserved", c_int32),
    ]


class DispatchOut(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", POINTER(Tensor)),
        ("scales", POINTER(Tensor)),
        ("topk_ids", POINTER(Tensor)),
        ("topk_weights", POINTER(Tensor)),
        ("extras", POINTER(Tensor) * MAX_EXTRAS),
        ("expert_counts", POINTER(Tensor)),
        ("rank_counts", POINTER(Tensor)),
        ("expert_offsets", POINTER(Tensor)),
        ("row_source", POINTER(Tensor)),
        ("expert_stats", POINTER(Tensor)),
        ("status", POINTER(Tensor)),
        ("num_rows", c_int64),
    ]


class CombineIn(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", POINTER(Tensor)),
        ("topk_weights", POINTER(Tensor)),
        ("row_weights", POINTER(Tensor)),
        ("flags", c_uint64),
        ("phase", c_int32),
        ("max_sms", c_int32),
    ]


class CombineOut(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", POINTER(Tensor)),
        ("topk_weights", POINTER(Tensor)),
        ("status", POINTER(Tensor)),
    ]


class ErrorInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("status", c_int32),
        ("operation", c_int32),
        ("slot", c_int32),
        ("rank", c_int32),
        ("peer", c_int32),
        ("reserved", c_int32),
        ("sequence", c_uint64),
        ("expected", c_uint64),
        ("seen", c_uint64),
        ("lost_ranks", c_uint64 * 16),
        ("message", c_char * 512),
    ]


class Stats(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dispatches", c_uint64),
        ("combines", c_uint64),
        ("rows_pushed", c_uint64),
        ("bytes_pushed", c_uint64),
        ("rows_pulled", c_uint64),
        ("bytes_pulled", c_uint64),
        ("rows_gathered", c_uint64),
        ("bytes_gathered", c_uint64),
        ("rows_fifo", c_uint64),
        ("bytes_fifo", c_uint64),
        ("rows_copied", c_uint64),
        ("bytes_copied", c_uint64),
        ("bytes_remote", c_uint64),
        ("hops", c_uint64),
        ("bad_ids", c_uint64),
        ("steps_lost", c_uint64),
    ]


class RecoverIn(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("timeout_ms", c_int64),
        ("patience_ms", c_int64),
    ]


class RecoverOut(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("generation", c_uint64),
        ("members", c_uint64 * 16),
        ("num_members", c_int32),
        ("replaced", c_int32),
        ("whole_steps", c_uint64 * 64),
    ]


# Every function: what it returns (None: a status, checked) and what it takes.
SIGNATURES = {
    "a2a_get_unique_id": (None, [POINTER(UniqueId)]),
    "a2a_unique_id_from_address": (None, [c_char_p, c_char_p, POINTER(UniqueId)]),
    "a2a_config_init": (None, [POINTER(Config), c_size_t]),
    "a2a_explain": (None, [POINTER(Config), c_char_p, c_size_t, POINTER(c_size_t)]),
    "a2a_query_memory": (None, [POINTER(Config), POINTER(Memory)]),
    "a2a_create": (None, [POINTER(Config), POINTER(c_void_p)]),
    "a2a_get_info": (None, [c_void_p, POINTER(Info)]),
    "a2a_set_timeout": (None, [c_void_p, c_int64, c_int64]),
    "a2a_recover": (None, [c_void_p, POINTER(RecoverIn), POINTER(RecoverOut)]),
    "a2a_connect_ranks": (None, [c_void_p, POINTER(c_int32), c_int32, c_int64]),
    "a2a_activate_ranks": (None, [c_void_p, POINTER(c_int32), c_int32, c_int64, POINTER(c_uint64)]),
    "a2a_disconnect_ranks": (None, [c_void_p, POINTER(c_int32), c_int32]),
    "a2a_set_rank_mask": (None, [c_void_p, POINTER(c_int32), c_int32]),
    "a2a_get_rank_mask": (None, [c_void_p, POINTER(c_int32), c_int32]),
    "a2a_abort": (None, [c_void_p]),
    "a2a_destroy": (None, [c_void_p]),
    "a2a_routing_create": (None, [c_void_p, c_int32, POINTER(c_void_p)]),
    "a2a_routing_destroy": (None, [c_void_p]),
    "a2a_dispatch": (None, [c_void_p, c_void_p, POINTER(DispatchIn), POINTER(DispatchOut), c_void_p]),
    "a2a_combine": (None, [c_void_p, c_void_p, POINTER(CombineIn), POINTER(CombineOut), c_void_p]),
    "a2a_combine_buffer": (None, [c_void_p, c_void_p, POINTER(Tensor)]),
    "a2a_get_async_error": (None, [c_void_p, POINTER(ErrorInfo)]),
    "a2a_get_history": (None, [c_void_p, c_char_p, c_size_t, POINTER(c_size_t)]),
    "a2a_get_stats": (None, [c_void_p, POINTER(Stats)]),
    "a2a_set_log_callback": (None, [LOG_FN, c_void_p]),
    "a2a_last_error": (c_char_p, []),
    "a2a_status_name": (c_char_p, [c_int32]),
    "a2a_version": (c_char_p, []),
    "a2a_backend_from_name": (c_int32, [c_char_p]),
}


class Error(Exception):
    """A call that did not succeed: its status and the library's sentence."""

    def __init__(self, status, name, text):
        super().__init__(status, name, text)  # as they came, so that it travels between processes
        self.status = status

    def __str__(self):
        return f"{self.args[1]}: {self.args[2]}"


def load(path=None):
    """The library from a path, from A2A_LIBRARY, or from the build tree beside this file."""
    built = Path(__file__).resolve().parents[2] / "target/release/liba2a.so"
    lib = ctypes.CDLL(str(path or os.environ.get("A2A_LIBRARY") or built))

    def check(status, function, arguments):
        if status != SUCCESS:
            raise Error(status, lib.a2a_status_name(status).decode(), lib.a2a_last_error().decode())
        return status

    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result or c_int32, arguments
        if result is None:
            function.errcheck = check
    return lib


def unique_id(lib):
    """A new group's name: make it once, give it to every rank."""
    name = UniqueId()
    lib.a2a_get_unique_id(name)
    return name
