"""The outputs of a dispatch: which there are for a layout and what was sent, and what takes them."""

import itertools
from collections.abc import Mapping
from ctypes import pointer
from typing import Any

from . import _abi
from ._abi import Backend, Device, Info, Layout, Quant, ScaleLayout
from .step import Rows, Step
from .tensor import Tensor, as_tensor, empty, float8_e4m3fn, float32, int32, strided

# By the names of a2a_dispatch_out_t.
OUTPUTS = (
    "tokens", "scales", "topk_ids", "topk_weights", "row_source", "extras", "expert_counts", "rank_counts", "expert_offsets",
    "expert_stats", "status",
)
BY_EXPERT = (Layout.EXPERT_PADDED, Layout.EXPERT_CONTIGUOUS)
IMMUTABLE = ("jax", "jaxlib")  # frameworks whose arrays are, though DLPack does not hear of it


class Outputs:
    """Those of a comm."""

    def __init__(self, info: Info, config: _abi.Config):
        self._layout, self._num_ranks = info.layout, info.num_ranks
        self._on_cuda, self._keeps_rows = info.device == Device.CUDA, info.backend != Backend.NVLINK_TWO_SIDED
        self._quant, self._scale_layout = Quant(config.quant), ScaleLayout(config.scale_layout)
        self._max_rows = config.max_recv_rows
        self._known: dict[Any, dict[str, Rows | None]] = {}  # for what has been sent before

    def of(self, step: Step, status: Tensor, stream: int | None) -> dict[str, Any]:
        """By name, what takes the outputs that a step wants: a Tensor of the caller's or of ours, or a struct that is a view or
        becomes one. status: where, on the CPU, the step's status goes if nobody says otherwise."""
        sent = (*step.rows.items(), *step.extras)
        exist = self._known.get(sent) or self._known.setdefault(sent, self._existing(step))
        outputs: dict[str, Any] = {}
        for name, array in (dict.fromkeys(exist if step.want is None else step.want) | dict(step.out or {})).items():
            if name == "extras":
                outputs[name] = tuple(
                    None if rows is None and one is None else self._taker(f"extras[{i}]", one, rows, step, stream)
                    for i, (one, rows) in enumerate(itertools.zip_longest(array or (), step.extras))
                )
            elif name == "status" and array is None and not self._on_cuda:
                outputs[name] = status._raw
            elif name in OUTPUTS:
                outputs[name] = self._taker(name, array, exist.get(name), step, stream)
            else:
                raise ValueError(f"dispatch has no output {name!r}, known are {', '.join(OUTPUTS)}")
        return outputs

    def _taker(self, name: str, array: Any, rows: Rows | None, step: Step, stream: int | None) -> Any:
        if array is not None:
            return writable(name, array, stream)
        if self._keeps_rows or self._on_cuda or rows is None:
            return _abi.Tensor()
        count = self._num_ranks * step.bound
        if self._max_rows:
            count = min(count, self._max_rows)
        if name == "scales" and self._scale_layout == ScaleLayout.COLUMN:
            padded = -(-count // 4) * 4
            return strided(empty((*rows.sizes, padded), rows.dtype), (count, *rows.sizes), (1, padded))
        return empty((count, *rows.sizes), rows.dtype)

    def _existing(self, step: Step) -> dict[str, Rows | None]:
        """All that there is for what was sent, and what a row of it holds, of those that have rows."""
        tokens, topk, scales = step.rows.get("tokens"), step.rows.get("topk_ids"), step.rows.get("scales")
        if tokens is not None and self._quant != Quant.NONE and tokens.dtype != float8_e4m3fn:
            groups = -(-tokens.sizes[-1] // 128) if tokens.sizes else 0
            scales = Rows((groups,), float32) if self._quant == Quant.FP8_F32_SCALES else Rows((-(-groups // 4),), int32)
            tokens = Rows(tokens.sizes, float8_e4m3fn)
        exist: dict[str, Rows | None] = {"tokens": tokens}
        if scales is not None:
            exist["scales"] = scales
        if topk is not None:
            if self._layout != Layout.EXPERT_PADDED:
                exist["topk_ids"] = Rows(topk.sizes, int32)
            exist["topk_weights"] = Rows(topk.sizes, float32)
            exist["expert_counts"] = None
        exist["row_source"] = Rows((2,), int32)
        if any(step.extras):
            exist["extras"] = None
        exist["rank_counts"] = exist["status"] = None
        if self._layout in BY_EXPERT:
            exist["expert_offsets"] = None
        return exist


def writable(name: str, array: Any, stream: int | None) -> Tensor:
    """An output of the caller's."""
    tensor = as_tensor(array, stream=stream)
    if tensor.readonly or type(array).__module__.partition(".")[0] in IMMUTABLE:
        raise ValueError(f"the output {name} is read-only")
    return tensor


def pointed(struct: Any, tensors: Mapping[str, Any]) -> Any:
    """A struct of the ABI that points at these tensors, by the names of its fields."""
    for name, tensor in tensors.items():
        if name == "extras":
            for i, extra in enumerate(tensor):
                if extra is not None:
                    struct.extras[i] = _pointer(extra)
        else:
            setattr(struct, name, _pointer(tensor))
    return struct


def _pointer(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return pointer(tensor)
    # Without data it may be filled in as a view, and it is not ours to write into.
    return pointer(tensor._raw if tensor._raw.data else _abi.Tensor.from_buffer_copy(tensor._raw))
