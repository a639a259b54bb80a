"""What the managers ask of the engine that they serve: its groups, the sizes of the step, its settings.

An engine of its own says so once in each process, before it makes a manager:

    a2a_vllm.use(a2a_vllm.Engine(ep_group=a2a_vllm.Group(rank, size, process_group), max_num_batched_tokens=8192))

Without that the engine is vLLM, whose own functions are asked.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol


class ProcessGroup(Protocol):
    """What ranks meet over, where it is neither torch's ProcessGroup nor vLLM's StatelessProcessGroup."""

    def rank(self) -> int: ...
    def size(self) -> int: ...

    def all_gather_object(self, value: Any) -> list:
        """Collective: every rank's value, rank ascending."""


class Coordinated(Protocol):
    """A group as vLLM's GroupCoordinator describes it."""

    @property
    def rank_in_group(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def cpu_group(self) -> ProcessGroup | None: ...


@dataclass(frozen=True)
class Group:
    """A group of an engine without vLLM. A group of one rank needs no cpu_group."""

    rank_in_group: int = 0
    world_size: int = 1
    cpu_group: ProcessGroup | None = None


ALONE = Group()


@dataclass
class Engine:
    """An engine's own answers. `local_sizes` is set before each step; everything else stays."""

    ep_group: Coordinated
    # Where they are left out: the expert-parallel group is data-parallel, without tensor and context parallelism.
    dp_group: Coordinated = ALONE
    tp_group: Coordinated = ALONE
    pcp_group: Coordinated = ALONE
    enable_expert_parallel: bool = True
    # Tokens that a rank dispatches in a step at most; the same on all ranks.
    max_num_batched_tokens: int = 8192
    # Ranks that the group may grow to; 0: as many as there are. NixlEPAll2AllManager.
    max_ep_ranks: int = 0
    # Steps go on without ranks that die: DeepEPLLAll2AllManager says so, NixlEPAll2AllManager does so on CPU memory.
    enable_fault_tolerance: bool = False
    # What NixlEPAll2AllManager quantises to: "" (nothing), "fp8" (float32 scales) or "ue8m0" (packed scales).
    nixl_dispatch: str = ""
    # DLPack's device type and ordinal: 1 is the CPU, 2 CUDA.
    device: tuple[int, int] = (1, 0)
    # The micro-batch of the calling thread, 0 or 1, where two overlap.
    ubatch: int = 0
    # Tokens of each rank of the group that dispatches; None: as many as here, everywhere.
    local_sizes: list[int] | None = None
    # Rank 0's "host:port" where ranks are on several hosts, and the managers' traffic may leave this one.
    address: str = ""

    def __post_init__(self):
        if self.dp_group is ALONE:
            self.dp_group = self.ep_group

    def capacity(self, world_size: int) -> int:
        """Ranks that a group which now has `world_size` may grow to."""
        return self.max_ep_ranks or world_size


class VllmEngine:
    """vLLM's answers. Settings are read where the config is set (managers are made there), the step's sizes at each step."""

    def __init__(self, nixl_dispatch: str = "", address: str = "", device: tuple[int, int] | None = None):
        """device: None: torch's current one."""
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        parallel = config.parallel_config
        self.enable_expert_parallel = parallel.enable_expert_parallel
        self.enable_fault_tolerance = parallel.enable_fault_tolerance
        self.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        self.max_replicas = parallel.elastic_ep_max_dp_size if parallel.enable_elastic_ep else parallel.data_parallel_size
        self.replicas = parallel.data_parallel_size
        self.nixl_dispatch, self.address = nixl_dispatch, address
        self.device = device or _current_device()

    def capacity(self, world_size: int) -> int:
        return world_size * self.max_replicas // self.replicas

    @property
    def ep_group(self):
        from vllm.distributed.parallel_state import get_ep_group

        return get_ep_group()

    @property
    def dp_group(self):
        from vllm.distributed.parallel_state import get_dp_group

        return get_dp_group()

    @property
    def tp_group(self):
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group()

    @property
    def pcp_group(self):
        from vllm.distributed.parallel_state import get_pcp_group

        return get_pcp_group()

    @property
    def ubatch(self) -> int:
        from vllm.v1.worker.ubatching import dbo_current_ubatch_id

        return dbo_current_ubatch_id()

    @property
    def local_sizes(self):
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().dp_metadata
        return None if metadata is None else metadata.get_chunk_sizes_across_dp_rank()


def _current_device() -> tuple[int, int]:
    import torch

    return (2, torch.cuda.current_device()) if torch.cuda.is_available() else (1, 0)


AnyEngine = Engine | VllmEngine
_used: AnyEngine | None = None


def use(engine: AnyEngine | None) -> None:
    """Says whose managers this process makes from now on; None: vLLM's."""
    global _used
    _used = engine


def current() -> AnyEngine:
    """The engine of a manager that is being made."""
    if _used is not None:
        return _used
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("a2a_vllm: vLLM is not installed, and no other engine was named: call a2a_vllm.use(a2a_vllm.Engine(...)) "
                           "before a manager is made")
    return VllmEngine()
