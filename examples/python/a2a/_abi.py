"""include/a2a.h for ctypes: its constants, its structs field by field, its functions. Nothing else is known of the ABI in Python.

A struct's fields are its annotations: what Python sees, and the C type. tests/python/test_layout.py holds this file against the
header.
"""

import ctypes
import inspect
from collections.abc import Iterator
from ctypes import POINTER, c_char, c_char_p, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint64, c_void_p
from enum import IntEnum, IntFlag
from typing import Annotated, Any, TypeVar

MAX_EXTRAS, MAX_TOPK, MAX_RANKS = 8, 32, 1024


class Status(IntEnum):
    """How a call ended. Below 16 the call is lost, below 32 the step, then the comm."""

    SUCCESS = 0
    INVALID_ARGUMENT = 1
    UNSUPPORTED = 2
    BUSY = 3
    OUT_OF_MEMORY = 4
    OVERFLOW = 5
    SYSTEM_ERROR = 6
    TIMEOUT = 16
    PEER_LOST = 17
    MISMATCH = 18
    CUDA_ERROR = 32
    NCCL_ERROR = 33
    NIXL_ERROR = 34
    ABORTED = 35
    INTERNAL = 36


class Backend(IntEnum):
    """The strategy that moves the rows."""

    AUTO = 0
    ALLGATHER_REDUCESCATTER = 1
    HIGH_THROUGHPUT = 2
    LOW_LATENCY = 3
    NVLINK_ONE_SIDED = 4
    NVLINK_TWO_SIDED = 5
    NIXL_ELASTIC = 6
    UNKNOWN = -1


class Transport(IntEnum):
    """What carries the bytes."""

    AUTO = 0
    WINDOW = 1
    NCCL = 2
    NIXL = 3


class Layout(IntEnum):
    """How dispatched rows lie."""

    AUTO = 0
    GATHERED = 1
    RANK_MAJOR = 2
    FLAT = 3
    EXPERT_PADDED = 4
    EXPERT_CONTIGUOUS = 5


class Device(IntEnum):
    """Where windows and tensors lie; DLPack's numbers."""

    CPU = 1
    CUDA = 2


class Dtype(IntEnum):
    """An element type in a config. Tensors have an `ElementType`."""

    DEFAULT = 0
    BF16 = 1
    F16 = 2
    F32 = 3
    F8_E4M3 = 4
    U8 = 5


class Quant(IntEnum):
    """Quantisation inside dispatch."""

    NONE = 0
    FP8_F32_SCALES = 1
    FP8_UE8M0_SCALES = 2


class ScaleLayout(IntEnum):
    """How the scales that dispatch makes lie."""

    ROW = 0
    COLUMN = 1


class Placement(IntEnum):
    """Which rank owns which expert."""

    CONTIGUOUS = 0
    TABLE = 1


class OverflowPolicy(IntEnum):
    """What happens past max_recv_rows."""

    ERROR = 0
    DROP = 1


class Bootstrap(IntEnum):
    """How ranks find each other."""

    UNIQUE_ID = 0
    ALLGATHER = 1


class Phase(IntEnum):
    """Which half of an operation a call performs."""

    BOTH = 0
    SEND = 1
    RECV = 2


class ConfigFlag(IntFlag):
    """Config.flags."""

    REMOTE = 1
    DEGRADE = 2


class DispatchFlag(IntFlag):
    """Flags of Comm.dispatch."""

    HOST_COUNTS = 1
    ZERO_PADDING = 2
    UNIFORM = 4
    REUSE = 8


class CombineFlag(IntFlag):
    """Flags of Comm.combine."""

    ACCUMULATE = 1
    NO_WEIGHTS = 2
    NCCL_SUM = 4


class StepFlag(IntFlag):
    """The first word of a step's status."""

    BAD_ID = 1
    DROPPED = 2
    VOID = 4
    OVERFLOW = 8
    DEGRADED = 16


class LogLevel(IntEnum):
    """How much a log line matters."""

    ERROR = 1
    WARN = 2
    INFO = 3
    DEBUG = 4


# What a2a.h puts between A2A_ and a member's name.
PREFIXES: dict[type[IntEnum] | type[IntFlag], str] = {
    Status: "", Backend: "BACKEND_", Transport: "TRANSPORT_", Layout: "LAYOUT_", Device: "DEVICE_", Dtype: "DTYPE_",
    Quant: "QUANT_", ScaleLayout: "SCALES_", Placement: "PLACEMENT_", OverflowPolicy: "OVERFLOW_",
    Bootstrap: "BOOTSTRAP_", Phase: "PHASE_", ConfigFlag: "CONFIG_", DispatchFlag: "DISPATCH_",
    CombineFlag: "COMBINE_", StepFlag: "STEP_", LogLevel: "LOG_",
}

S = TypeVar("S", bound=ctypes.Structure)


def struct(cls: type[S]) -> type[S]:
    """Gives a ctypes struct the fields of its annotations. A field that Python sees as an enum gives its members."""
    hints = {name: hint for name, hint in inspect.get_annotations(cls).items() if hasattr(hint, "__metadata__")}
    cls._fields_ = [(name, hint.__metadata__[0]) for name, hint in hints.items()]
    for name, hint in hints.items():
        if isinstance(hint.__origin__, type) and issubclass(hint.__origin__, IntEnum):
            setattr(cls, name, EnumField(getattr(cls, name), hint.__origin__))
    return cls


class EnumField:
    """A field that holds a member of an enum."""

    def __init__(self, field: Any, enum: type[IntEnum]):
        self.field, self.enum = field, enum
        self.offset, self.size = field.offset, field.size

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = self.field.__get__(instance, owner)
        return self.enum._value2member_map_.get(value, value)  # a later library may know more

    def __set__(self, instance: Any, value: int) -> None:
        self.field.__set__(instance, value)


I32 = Annotated[int, c_int32]
I64 = Annotated[int, c_int64]
U64 = Annotated[int, c_uint64]
Size = Annotated[int, c_size_t]
Address = Annotated[int | None, c_void_p]


@struct
class UniqueId(ctypes.Structure):
    bytes: Annotated[ctypes.Array[c_uint8], c_uint8 * 128]


@struct
class TensorDevice(ctypes.Structure):
    device_type: I32
    device_id: I32


@struct
class TensorDtype(ctypes.Structure):
    code: Annotated[int, c_uint8]
    bits: Annotated[int, c_uint8]
    lanes: Annotated[int, c_uint16]


@struct
class Tensor(ctypes.Structure):
    """DLPack's DLTensor. `Tensor()` is an output that becomes a view. What points at it keeps it, and it what it points at."""

    keeper: Any = None
    data: Address
    device: Annotated[TensorDevice, TensorDevice]
    ndim: I32
    dtype: Annotated[TensorDtype, TensorDtype]
    shape: Annotated[Any, POINTER(c_int64)]
    strides: Annotated[Any, POINTER(c_int64)]
    byte_offset: U64


TensorPointer = Annotated[Any, POINTER(Tensor)]
TensorPointers = Annotated[Any, POINTER(Tensor) * MAX_EXTRAS]
RankMask = Annotated[ctypes.Array[c_uint64], c_uint64 * 16]
ALLGATHER_FN = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t, c_void_p)
LOG_FN = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Sized(ctypes.Structure):
    """A struct that begins with its own size: set here, the rest zero but for what is given."""

    def __init__(self, **fields: Any):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and values, but for struct_size: dict(struct) is what the library says."""
        return ((name, getattr(self, name)) for name, *_ in self._fields_[1:])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self)})"


@struct
class Config(Sized):
    struct_size: Size
    rank: I32
    num_ranks: I32
    max_ranks: I32
    ranks_per_device: I32
    device: I32
    device_ordinal: I32
    backend: I32
    transport: I32
    layout: I32
    num_experts: I32
    placement: I32
    max_topk: I32
    max_hidden: I32
    max_tokens: I32
    token_dtype: I32
    combine_dtype: I32
    combine_hidden: I32
    quant: I32
    scale_layout: I32
    max_scale_bytes: I32
    extra_row_bytes: Annotated[Any, c_int32 * MAX_EXTRAS]
    num_slots: I32
    expert_alignment: I32
    overflow: I32
    max_sms: I32
    max_recv_rows: I64
    setup_timeout_ms: I64
    first_step_timeout_ms: I64
    timeout_ms: I64
    memory_limit: U64
    flags: U64
    expert_owner: Annotated[Any, POINTER(c_int32)]
    bootstrap: I32
    fifo_rows: I32
    unique_id: Annotated[UniqueId, UniqueId]
    allgather: Annotated[Any, ALLGATHER_FN]
    allgather_user: Address
    nccl_comm: Address


@struct
class Memory(Sized):
    """What Comm and Comm.routing take on this rank, in bytes."""

    struct_size: Size
    window_bytes: U64
    control_bytes: U64
    slot_bytes: U64
    private_bytes: U64
    routing_bytes: U64
    total_bytes: U64
    pinned_bytes: U64


@struct
class Info(Sized):
    """What a comm is: what was chosen, the experts this rank owns, capacities."""

    struct_size: Size
    rank: I32
    num_ranks: I32
    max_ranks: I32
    device: Annotated[Device, c_int32]
    device_ordinal: I32
    backend: Annotated[Backend, c_int32]
    transport: Annotated[Transport, c_int32]
    layout: Annotated[Layout, c_int32]
    num_experts: I32
    first_expert: I32
    num_local_experts: I32
    max_topk: I32
    max_hidden: I32
    max_tokens: I32
    num_slots: I32
    max_sms: I32
    row_capacity: I64
    window_bytes: U64


@struct
class DispatchIn(Sized):
    struct_size: Size
    tokens: TensorPointer
    topk_ids: TensorPointer
    topk_weights: TensorPointer
    scales: TensorPointer
    extras: TensorPointers
    rank_tokens: Annotated[Any, POINTER(c_int32)]
    max_tokens: I32
    phase: I32
    flags: U64
    max_sms: I32
    reserved: I32


@struct
class DispatchOut(Sized):
    struct_size: Size
    tokens: TensorPointer
    scales: TensorPointer
    topk_ids: TensorPointer
    topk_weights: TensorPointer
    extras: TensorPointers
    expert_counts: TensorPointer
    rank_counts: TensorPointer
    expert_offsets: TensorPointer
    row_source: TensorPointer
    expert_stats: TensorPointer
    status: TensorPointer
    num_rows: I64


@struct
class CombineIn(Sized):
    struct_size: Size
    tokens: TensorPointer
    topk_weights: TensorPointer
    row_weights: TensorPointer
    flags: U64
    phase: I32
    max_sms: I32


@struct
class CombineOut(Sized):
    struct_size: Size
    tokens: TensorPointer
    topk_weights: TensorPointer
    status: TensorPointer


@struct
class ErrorInfo(Sized):
    struct_size: Size
    status: Annotated[Status, c_int32]
    operation: I32
    slot: I32
    rank: I32
    peer: I32
    reserved: I32
    sequence: U64
    expected: U64
    seen: U64
    lost_ranks: RankMask
    message: Annotated[bytes, c_char * 512]


@struct
class Stats(Sized):
    """What a comm has moved since it was created, in rows and bytes."""

    struct_size: Size
    dispatches: U64
    combines: U64
    rows_pushed: U64
    bytes_pushed: U64
    rows_pulled: U64
    bytes_pulled: U64
    rows_gathered: U64
    bytes_gathered: U64
    rows_fifo: U64
    bytes_fifo: U64
    rows_copied: U64
    bytes_copied: U64
    bytes_remote: U64
    hops: U64
    bad_ids: U64
    steps_lost: U64


@struct
class RecoverIn(Sized):
    struct_size: Size
    timeout_ms: I64
    patience_ms: I64


@struct
class RecoverOut(Sized):
    struct_size: Size
    generation: U64
    members: RankMask
    num_members: I32
    replaced: I32
    whole_steps: Annotated[ctypes.Array[c_uint64], c_uint64 * 64]


# Every function: what it returns (None: a status) and what it takes.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
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
