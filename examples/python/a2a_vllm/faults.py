"""Which ranks are lost, as vLLM asks it: an int32 for each rank, 0 live and 1 lost, and whether that has changed."""

from __future__ import annotations

from . import arrays
from .arrays import Tensor


class Watch:
    """A mask and what it was when it was last cleaned."""

    def __init__(self):
        self._baseline: list[int] | None = None

    def fault(self, mask: list[int]) -> Tensor:
        """A bool: whether the mask is another than the last clean one; before any, than one without a loss."""
        library = arrays.default()
        known = self._baseline if self._baseline and len(self._baseline) == len(mask) else [0] * len(mask)
        return (as_tensor(mask) != library.from_list(known, "int32")).any()

    def clean(self, mask: list[int]) -> None:
        self._baseline = mask


def as_tensor(mask: list[int]) -> Tensor:
    return arrays.default().from_list(mask, "int32")
