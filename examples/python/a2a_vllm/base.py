"""All2AllManagerBase: what every manager has, and how handles are shared between layers."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import arrays, engine, faults, groups
from .arrays import Device, Dtype, Tensor
from .comms import Comms

logger = logging.getLogger(__name__)


class Cache:
    """Handles by what they were made from. One lives as long as somebody holds it: layers that ask alike share one."""

    def __init__(self):
        self._cache: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def get_or_create(self, kwargs: dict, func: Callable) -> Any:
        key = tuple(sorted((name, value) for name, value in kwargs.items()))
        with self._lock:
            handle = self._cache.get(key)
            if handle is None:
                handle = self._cache[key] = func(**kwargs)
            return handle

    def handles(self) -> list:
        with self._lock:
            return list(self._cache.values())

    def clear(self) -> None:
        with self._lock:
            self._cache.clear()


class All2AllManagerBase:
    """One rank's part of an expert-parallel group. What a manager lacks raises NotImplementedError and says what it has instead."""

    rank: int
    world_size: int

    def __init__(self, cpu_group, tcp_store_group=None):
        self.cpu_group, self.tcp_store_group = cpu_group, tcp_store_group
        self.engine = engine.current()
        self.dp_group, self.tp_group = self.engine.dp_group, self.engine.tp_group
        self.dp_rank, self.dp_world_size = self.dp_group.rank_in_group, self.dp_group.world_size
        self.rank, self.world_size = groups.member(cpu_group, "rank"), groups.member(cpu_group, "size")
        self.meeting_group = cpu_group if tcp_store_group is None else tcp_store_group
        self.internode = len(set(groups.gather(self.meeting_group, groups.host()))) > 1
        self.support_fault_tolerance = False
        self._watch = faults.Watch()

    def _lacks(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {what}: {self._instead}")

    _instead = "its rows travel through what get_handle gives"

    def get_handle(self, kwargs):
        raise self._lacks("get_handle")

    def dispatch_router_logits(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        raise self._lacks("dispatch_router_logits")

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        raise self._lacks("dispatch")

    def combine(self, hidden_states: Tensor, is_sequence_parallel: bool = False):
        raise self._lacks("combine")

    def allocate_combine_input(
        self,
        shape: tuple[int, ...],
        dtype: Dtype,
        device: Device,
        is_sequence_parallel: bool = False,
    ) -> Tensor | None:
        """None: no memory is better than any other."""
        return None

    def combine_into_output(
        self,
        hidden_states: Tensor,
        output: Tensor,
        is_sequence_parallel: bool = False,
    ) -> Tensor:
        arrays.of(output).copy(output, self.combine(hidden_states, is_sequence_parallel))
        return output

    def query_active_mask(self) -> Tensor:
        """[R] int32: 0 is live, 1 is lost, as far as the host knows now: on CUDA a step in flight may find out more. Not for captured
        graphs, where the answer would stay the one of the capture."""
        return faults.as_tensor(self._mask(), self.engine)

    def query_fault(self) -> Tensor:
        """A bool: whether the mask is another than when it was last cleaned, as far as the host knows now: on CUDA ask after the stream
        has passed the step (torch.cuda.current_stream().synchronize(), or the event that its tokens are waited for with)."""
        return self._watch.fault(self._mask(), self.engine)

    def clean_buffers(self) -> None:
        """Collective over the ranks that are left: their comms go on among them, and what was under way is void."""
        for comms in self._used():
            comms.recover()
        self._watch.clean(self._mask())

    def _used(self) -> list[Comms]:
        """The comms over this manager's group, in the order in which all ranks made them."""
        raise self._lacks("mask of ranks")

    def _mask(self) -> list[int]:
        masks = [comms.mask() for comms in self._used()]
        return [int(any(mask[rank] for mask in masks)) for rank in range(self.world_size)]

    def set_num_sms(self, num_sms: int):
        """Bounds the multiprocessors of later calls, and says what is in effect; None: nothing changed."""

    def max_sms_used(self) -> int | None:
        """None: as many as there are. 0: so few that none need to be set aside."""
        return None

    def checkpoint_prepare(self) -> None:
        logger.warning("%s has no checkpoint_prepare: it keeps its memory", type(self).__name__)

    def checkpoint_restore(self) -> None:
        logger.warning("%s has no checkpoint_restore: it kept its memory", type(self).__name__)

    def stage_ep_size(self) -> None:
        """Nothing to prepare: this manager's group stays as it is."""

    def commit_ep_size(self) -> None:
        """Nothing to change: this manager's group stays as it is."""

    @contextmanager
    def mask_remote_ranks(self) -> Iterator[None]:
        yield

    def destroy(self):
        """Frees what the manager took, once this rank's own work on its device is done: a step that waits for a lost rank ends at its
        deadline. May be called again."""
