"""Which ranks are lost, as vLLM asks it: an int32 for each rank, 0 live and 1 lost, and whether that has changed.

The answer is what this rank's host knows when it is asked, not what its stream will know after the work it has been given: on CUDA a
loss that a step in flight runs into is seen once the stream has passed that step.
"""

from __future__ import annotations

from . import arrays
from .arrays import Tensor
from .engine import AnyEngine


class Watch:
    """What a mask was when it was last cleaned."""

    def __init__(self):
        self._clean: list[int] = []

    def fault(self, mask: list[int], engine: AnyEngine) -> Tensor:
        """A bool on the engine's device: whether the mask is another than then; of a mask of another length, whether it has a loss."""
        clean = self._clean if len(self._clean) == len(mask) else [0] * len(mask)
        return as_tensor([int(mask != clean)], engine).any()

    def clean(self, mask: list[int]) -> None:
        self._clean = mask


def as_tensor(mask: list[int], engine: AnyEngine, library: arrays.Arrays | None = None) -> Tensor:
    """[R] int32 on the engine's device, of a library or the default one."""
    library = library or arrays.default()
    return library.from_list(mask, "int32", library.device(*engine.device))
