"""What a comm is made of, and what the library says of it before anything is made."""

import ctypes
import json
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_size_t
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, TypeVar

from . import _abi, tensor
from ._abi import Backend, Bootstrap, Device, Dtype, Layout, Memory, OverflowPolicy, Placement, Quant, ScaleLayout, Transport
from ._library import library


class UniqueId:
    """The name of one group of ranks: made once, copied to every rank by any means, used for one comm on each.

    Whoever has its bytes can join: treat them as a secret.
    """

    SIZE = ctypes.sizeof(_abi.UniqueId)

    def __init__(self, data: bytes):
        if len(data) != self.SIZE:
            raise ValueError(f"a unique id has {self.SIZE} bytes, not {len(data)}")
        self._data = bytes(data)

    @classmethod
    def create(cls) -> "UniqueId":
        """A new group on this host."""
        made = _abi.UniqueId()
        library().a2a_get_unique_id(made)
        return cls(bytes(made))

    @classmethod
    def from_address(cls, address: str, key: str) -> "UniqueId":
        """A group by a "host:port" on which rank 0 listens and a secret, which all ranks know: each makes the same id."""
        made = _abi.UniqueId()
        library().a2a_unique_id_from_address(address.encode(), key.encode(), made)
        return cls(bytes(made))

    def __bytes__(self) -> bytes:
        return self._data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniqueId) and self._data == other._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return "a2a.UniqueId(...)"  # a secret


# Bytes of this rank, of every rank: concatenated, or one by one, rank ascending.
AllGather = Callable[[bytes], "bytes | Sequence[bytes]"]


@dataclass(kw_only=True)
class Config:
    """The fields of a2a_config_t, by the same names; a2a.h describes each. 0 means the default everywhere.

    Enums are members, numbers or names ("flat", "low_latency", vLLM's names of backends); dtypes may be those of numpy or torch.
    """

    rank: int = 0
    num_ranks: int = 0
    max_ranks: int = 0
    ranks_per_device: int = 0
    device: Device | int | str = 0
    device_ordinal: int = 0
    backend: Backend | int | str = Backend.AUTO
    transport: Transport | int | str = Transport.AUTO
    layout: Layout | int | str = Layout.AUTO
    num_experts: int = 0
    placement: Placement | int | str = Placement.CONTIGUOUS
    max_topk: int = 0
    max_hidden: int = 0
    max_tokens: int = 0
    token_dtype: Any = Dtype.DEFAULT
    combine_dtype: Any = Dtype.DEFAULT
    combine_hidden: int = 0
    quant: Quant | int | str = Quant.NONE
    scale_layout: ScaleLayout | int | str = ScaleLayout.ROW
    max_scale_bytes: int = 0
    extra_row_bytes: Sequence[int] = ()
    num_slots: int = 0
    expert_alignment: int = 0
    overflow: OverflowPolicy | int | str = OverflowPolicy.ERROR
    max_sms: int = 0
    max_recv_rows: int = 0
    setup_timeout_ms: int = 0
    first_step_timeout_ms: int = 0
    timeout_ms: int = 0
    memory_limit: int = 0
    flags: int = 0
    expert_owner: Sequence[int] | None = None
    bootstrap: Bootstrap | int | str | None = None
    fifo_rows: int = 0
    unique_id: UniqueId | bytes | None = field(default=None, repr=False)  # a secret
    allgather: AllGather | None = None
    nccl_comm: int | None = None

    def raw(self) -> "RawConfig":
        """The struct that the library reads."""
        return RawConfig(self)


# Fields that are members of an enum.
ENUMS: dict[str, type[IntEnum]] = {
    "device": Device, "transport": Transport, "layout": Layout, "placement": Placement, "quant": Quant,
    "scale_layout": ScaleLayout, "overflow": OverflowPolicy,
}


class RawConfig(_abi.Config):
    """A config as the library reads it, with what it points at."""

    failure: BaseException | None = None  # what the caller's all-gather raised

    def __init__(self, config: Config):
        values = {one.name: getattr(config, one.name) for one in fields(config)}
        for name, enum in ENUMS.items():
            values[name] = member(name, enum, values[name])
        values["backend"] = backend_of(config.backend)
        for name in ("token_dtype", "combine_dtype"):
            values[name] = dtype_of(name, values[name])
        bootstrap = config.bootstrap
        if bootstrap is None:
            bootstrap = Bootstrap.UNIQUE_ID if config.allgather is None else Bootstrap.ALLGATHER
        values["bootstrap"] = member("bootstrap", Bootstrap, bootstrap)
        if len(config.extra_row_bytes) > _abi.MAX_EXTRAS:
            raise ValueError(f"extra_row_bytes has {len(config.extra_row_bytes)} entries, at most {_abi.MAX_EXTRAS}")
        values["extra_row_bytes"] = (c_int32 * _abi.MAX_EXTRAS)(*config.extra_row_bytes)
        if config.expert_owner is not None:
            if len(config.expert_owner) != config.num_experts:
                raise ValueError(
                    f"expert_owner has {len(config.expert_owner)} entries, num_experts is {config.num_experts}"
                )
            values["expert_owner"] = (c_int32 * len(config.expert_owner))(*config.expert_owner)
        unique_id = values.pop("unique_id")
        if unique_id is not None:
            values["unique_id"] = _abi.UniqueId.from_buffer_copy(bytes(UniqueId(bytes(unique_id))))
        if values.pop("allgather") is not None:
            values["allgather"] = _abi.ALLGATHER_FN(self._gather)
        self._allgather, self._num_ranks = config.allgather, config.num_ranks
        super().__init__(**{name: value for name, value in values.items() if value is not None})

    def _gather(self, send: int, recv: int, size: int, _user: int) -> int:
        assert self._allgather is not None
        try:
            gathered = self._allgather(ctypes.string_at(send, size))
            data = gathered if isinstance(gathered, (bytes, bytearray)) else b"".join(gathered)
            if len(data) != size * self._num_ranks:
                raise ValueError(f"allgather gave {len(data)} bytes, {size} of each of {self._num_ranks} ranks were due")
            ctypes.memmove(recv, bytes(data), len(data))
            return 0
        except BaseException as error:  # goes on where the library has returned
            self.failure = error
            return 1


E = TypeVar("E", bound=IntEnum)


def member(name: str, enum: type[E], value: Any) -> int:
    """An enum's value by a member, a number or a name. Numbers are the library's to refuse."""
    if isinstance(value, str):
        try:
            return enum[value.upper()]
        except KeyError:
            raise ValueError(f"{name} is {value!r}, known are {', '.join(one.name.lower() for one in enum)}") from None
    if isinstance(value, IntEnum) and not isinstance(value, enum):
        raise TypeError(f"{name} is {value!r}, it must be one of {enum.__name__}")
    return int(value)


def backend_from_name(name: str) -> Backend:
    """The backend of a name, vLLM's ("deepep_low_latency") or our own; Backend.UNKNOWN for any other."""
    return Backend(library().a2a_backend_from_name(name.encode()))


def backend_of(value: Backend | int | str) -> int:
    if not isinstance(value, str):
        return member("backend", Backend, value)
    backend = backend_from_name(value)
    if backend == Backend.UNKNOWN:
        known = ", ".join(one.name.lower() for one in Backend if one != Backend.UNKNOWN)
        raise ValueError(f"backend is {value!r}, known are {known}, and vLLM's names")
    return backend


def dtype_of(name: str, value: Any) -> int:
    """A config's dtype by whatever names an element type."""
    if isinstance(value, int):
        return member(name, Dtype, value)
    element = tensor.element_type(value)
    for dtype, known in tensor.BY_DTYPE.items():
        if known == element:
            return dtype
    raise ValueError(f"{name} is {element}, a comm knows {', '.join(str(known) for known in tensor.BY_DTYPE.values())}")


def explain(config: Config | None = None, **settings: Any) -> dict[str, Any]:
    """What `Comm` would do with this config on this host: which backend and layout and why, why not the others, bytes, limits.

    A config that is refused as unsupported is explained (["status"] is "refused"); one that makes no sense raises.
    """
    raw, needed = config_of(config, settings).raw(), c_size_t()
    library().a2a_explain(raw, None, 0, needed)
    text = ctypes.create_string_buffer(needed.value)
    library().a2a_explain(raw, text, needed, None)
    explained: dict[str, Any] = json.loads(text.value)
    return explained


def query_memory(config: Config | None = None, **settings: Any) -> Memory:
    """The bytes that `Comm` and `Comm.routing` will take with this config."""
    memory = Memory()
    library().a2a_query_memory(config_of(config, settings).raw(), memory)
    return memory


def config_of(config: Config | None, settings: dict[str, Any]) -> Config:
    """A config, or its fields; fields replace those of a config beside them."""
    if config is None:
        return Config(**settings)
    if not isinstance(config, Config):
        raise TypeError(f"config is a {type(config).__name__}, it must be an a2a.Config; fields go by name")
    return Config(**{one.name: getattr(config, one.name) for one in fields(config)} | settings)
