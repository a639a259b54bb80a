"""What a modular MoE kernel asks of an all-to-all: prepare and finalize, for each manager, with vLLM's names and shapes.

prepare gives (rows, scales or None, counts or None, topk_ids or None, topk_weights or None): what came from all ranks, for the experts
here. finalize writes the sums for this rank's own tokens into `output`. Row sets are

    Standard        [rows, H], once for each token with an expert here; topk_ids [rows, K] are global ids, -1 past the counts
    BatchedExperts  [L, R * max_tokens, H], by expert; the first counts[e] of each are rows, the rest is undefined

Rows stay as they are until finalize. Quantisation is the engine's, before the rows travel (`quantize`), but for the batched ones, whose
dispatch quantises itself (`use_fp8_dispatch`); a scale that mixes rows (a swizzle) is made by `arrange_scales` once they are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from . import arrays, engine
from .arrays import Tensor


class ActivationFormat(Enum):
    """How prepare's rows lie; values as vLLM's FusedMoEActivationFormat has them."""

    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


@dataclass
class ExpertTokensMetadata:
    """expert_num_tokens: [L] int32, on the device. expert_num_tokens_cpu: the same on the host, or None: derive your own."""

    expert_num_tokens: Tensor
    expert_num_tokens_cpu: Tensor | None = None


PrepareResult = tuple[Tensor, Tensor | None, ExpertTokensMetadata | None, Tensor | None, Tensor | None]


class TopKWeightAndReduceDelegate:
    """The experts leave weights and sum over the top-k to finalize."""


def reduced(impl: Any, rows: Tensor, weights: Tensor, ids: Tensor, applied: bool) -> Tensor:
    """[rows, H] of what the experts wrote: as it is, or [rows, K, H] (or [rows * K, H]) weighted and summed over k."""
    if not type(impl).__name__.endswith("Delegate"):
        return rows if impl is None else impl.apply(
            output=None, fused_expert_output=rows, topk_weights=weights, topk_ids=ids, apply_router_weight_on_input=applied)
    if rows.shape[0] == ids.shape[0] and len(rows.shape) == 2 and ids.shape[1] != 1:
        return rows
    return arrays.of(rows).weighted(rows.reshape(*ids.shape, rows.shape[-1]), None if applied else weights)
