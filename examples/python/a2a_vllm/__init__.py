"""The managers of vLLM's vllm.distributed.device_communicators.all2all over liba2a: their names, calls and results.

Tensors are torch's, numpy's or CuPy's; torch is not needed. docs/vllm.md says what each call gives, and what is resolved how where
vLLM's managers differ among themselves.
"""

from .allgather_reducescatter import AgRsAll2AllManager
from .base import All2AllManagerBase
from .deepep import (
    DeepEPAll2AllManagerBase, DeepEPHTAll2AllManager, DeepEPLLAll2AllManager, HighThroughputBuffer, LowLatencyBuffer,
)
from .engine import Engine, Group, VllmEngine, use
from .flashinfer_nvlink import (
    FlashInferNVLinkOneSidedManager, FlashInferNVLinkTwoSidedManager, OneSidedCommunication, TwoSidedCommunication,
)
from .groups import StoreGroup
from .nixl_ep import NixlBuffer, NixlEPAll2AllManager

__all__ = [
    "AgRsAll2AllManager", "All2AllManagerBase", "DeepEPAll2AllManagerBase", "DeepEPHTAll2AllManager",
    "DeepEPLLAll2AllManager", "Engine", "FlashInferNVLinkOneSidedManager", "FlashInferNVLinkTwoSidedManager", "Group",
    "HighThroughputBuffer", "LowLatencyBuffer", "NixlBuffer", "NixlEPAll2AllManager", "OneSidedCommunication", "StoreGroup",
    "TwoSidedCommunication", "VllmEngine", "use",
]
