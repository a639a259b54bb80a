"""Rows by expert, for LOW_LATENCY and NIXL_ELASTIC: what low_latency_dispatch of DeepEP and dispatch of NIXL EP have in common.

A dispatch whose receiving half comes later has to say now where its rows will be. A view lies at the same place whenever a slot takes
a step of the same shape; so the first step of a shape on a slot is received at once, and later ones when their hook is called.
"""

from __future__ import annotations

import a2a

from . import arrays
from .arrays import Tensor
from .comms import Handle, Wire

# What dispatch makes of 16-bit rows, by name.
QUANT = {"": a2a.Quant.NONE, "fp8": a2a.Quant.FP8_F32_SCALES, "ue8m0": a2a.Quant.FP8_UE8M0_SCALES}


def format_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str:
    """The name in QUANT for the three switches that DeepEP and NIXL EP have."""
    if round_scale != use_ue8m0:
        raise ValueError(f"round_scale is {round_scale} and use_ue8m0 is {use_ue8m0}: scales are float32 as they come out, or powers of "
                         "two packed as UE8M0")
    return "" if not use_fp8 else "ue8m0" if use_ue8m0 else "fp8"


def fields_of(quant: str) -> dict:
    """The config fields of a name in QUANT. Scales lie by column, as grouped GEMMs load them."""
    return dict(quant=QUANT[quant], scale_layout=a2a.ScaleLayout.COLUMN) if quant else {}


class Event:
    """What a call leaves behind for whoever overlaps streams: nothing, since all work is on the caller's."""

    event = None

    def current_stream_wait(self) -> None:
        """Returns at once."""


class Views:
    """Where a slot's steps of one shape stand."""

    def __init__(self, received: a2a.Received, like: Tensor):
        take = arrays.of(like).take
        self._addresses = self._addresses_of(received)
        rows, scales = take(received.tokens), getattr(received, "scales", None)
        self.rows = rows if scales is None else (rows, take(scales))
        self.counts = take(received.expert_counts)

    @staticmethod
    def _addresses_of(received: a2a.Received) -> list[int]:
        return [getattr(received, name).address for name in ("tokens", "scales", "expert_counts") if hasattr(received, name)]

    def check(self, received: a2a.Received) -> None:
        """Refuses a step that stands elsewhere than its caller was told."""
        if self._addresses_of(received) != self._addresses:
            raise RuntimeError("liba2a: a step's rows are not where the slot's last ones of the same shape were: a defect, please report it")


def dispatch(wire: Wire, x: Tensor, topk_idx: Tensor, max_tokens: int, later: bool, stats: Tensor | None = None):
    """(rows or (rows, scales), counts, handle, event, hook); hook receives if `later`, else all is there.

    rows: [L, R * max_tokens, H]; scales, where the comm quantises: [L, R * max_tokens, S]; counts: [L] int32. stats: [L] int64, added to.
    """
    x = arrays.rows(x)
    shape = (wire.next_routing.slot, max_tokens, x.shape[1], arrays.of(x).name_of(x))
    want = ("tokens", "expert_counts") + (("scales",) if wire.quantises else ())
    out = {} if stats is None else dict(expert_stats=stats)

    if later and shape in wire.views:
        handle, _ = wire.dispatch(x, topk_idx, max_tokens=max_tokens, phase=a2a.SEND, want=want, out=out)

        def hook() -> None:
            wire.views[shape].check(handle.comm.dispatch_recv(handle.routing))

    else:
        handle, received = wire.dispatch(x, topk_idx, max_tokens=max_tokens, want=want, out=out)
        if shape not in wire.views:
            wire.views[shape] = Views(received, x)
        wire.views[shape].check(received)
        hook = nothing
    return wire.views[shape].rows, wire.views[shape].counts, handle, Event(), hook


def combine(handle: Handle, x: Tensor, topk_weights: Tensor, later: bool, out: Tensor | None = None):
    """(out, event, hook): out [T, H] is the weighted sum of x [L, R * max_tokens, H] over k; there once hook has been called if `later`."""
    if out is None:
        out = arrays.empty((handle.tokens, x.shape[-1]), x)
    if not later:
        handle.comm.combine(handle.routing, x, out, weights=topk_weights)
        return out, Event(), nothing
    handle.comm.combine(handle.routing, x, out, weights=topk_weights, phase=a2a.SEND)

    def hook() -> None:
        handle.comm.combine_recv(handle.routing)

    return out, Event(), hook


def combine_buffer(handle: Handle) -> Tensor:
    """[L, R * max_tokens, H]: where experts write what combine then need not copy."""
    return handle.library.take(handle.comm.combine_buffer(handle.routing))


def nothing() -> None:
    """A hook for what is done already."""
