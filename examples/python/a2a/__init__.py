"""liba2a for Python: mixture-of-experts tokens between ranks, by ctypes alone. Arrays go in and come out by DLPack.

    config = a2a.Config(rank=rank, num_ranks=8, num_experts=64, max_topk=8, max_hidden=7168, max_tokens=128, unique_id=group)
    with a2a.Comm(config) as comm, comm.routing() as routing:
        received = comm.dispatch(routing, tokens, topk_ids, topk_weights)
        results = experts(torch.from_dlpack(received.tokens), ...)
        comm.combine(routing, results, out)

The calls are those of a2a.h, which says what each argument means; an exception has the library's status, sentence and ranks.
"""

from ._abi import (
    MAX_EXTRAS, MAX_RANKS, MAX_TOPK, Backend, Bootstrap, CombineFlag, ConfigFlag, Device, DispatchFlag, Dtype, Info, Layout,
    LogLevel, Memory, OverflowPolicy, Phase, Placement, Quant, ScaleLayout, Stats, Status, StepFlag, Transport,
)
from ._library import LibraryNotFoundError, version
from ._outputs import OUTPUTS
from .comm import BOTH, RECV, SEND, AsyncError, Comm, Recovery, Routing
from .config import Config, UniqueId, backend_from_name, explain, query_memory
from .errors import (
    AbortedError, BusyError, CallError, CommError, CudaError, Error, InternalError, InvalidArgumentError, MismatchError,
    NcclError, NixlError, OutOfMemoryError, OverflowError, PeerLostError, StepError, SystemError, TimeoutError, UnsupportedError,
    error_of,
)
from .log import set_log_callback
from .step import Received
from .tensor import (
    ElementType, SupportsDLPack, Tensor, as_tensor, bfloat16, bool_, element_type, empty, float8_e4m3fn, float8_e5m2,
    float8_e8m0fnu, float16, float32, float64, from_list, int8, int16, int32, int64, uint8, uint16, uint32, uint64,
)

__all__ = [
    "AbortedError", "AsyncError", "BOTH", "Backend", "Bootstrap", "BusyError", "CallError", "CombineFlag", "Comm",
    "CommError", "Config", "ConfigFlag", "CudaError", "Device", "DispatchFlag", "Dtype", "ElementType", "Error", "Info",
    "InternalError", "InvalidArgumentError", "Layout", "LibraryNotFoundError", "LogLevel", "MAX_EXTRAS", "MAX_RANKS",
    "MAX_TOPK", "Memory", "MismatchError", "NcclError", "NixlError", "OUTPUTS", "OutOfMemoryError", "OverflowError",
    "OverflowPolicy", "PeerLostError", "Phase", "Placement", "Quant", "RECV", "Received", "Recovery", "Routing", "SEND",
    "ScaleLayout", "Stats", "Status", "StepError", "StepFlag", "SupportsDLPack", "SystemError", "Tensor", "TimeoutError",
    "Transport", "UniqueId", "UnsupportedError", "as_tensor", "backend_from_name", "bfloat16", "bool_", "element_type",
    "empty", "error_of", "explain", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
    "from_list", "int16", "int32", "int64", "int8", "query_memory", "set_log_callback", "uint16", "uint32", "uint64", "uint8",
    "version",
]
