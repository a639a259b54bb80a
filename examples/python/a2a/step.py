"""What a dispatch is known by afterwards: what it sent, and what it received."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ._lifetime import Hold, Lease
from .tensor import ElementType, Tensor, view_of


class Received:
    """What one dispatch received: a `Tensor` for each output that was wanted, by its name in a2a_dispatch_out_t.

    Those below; extras has None where none was sent. Shapes are those of a2a.h (a2a_dispatch_out_t). What the layout has not or
    was not wanted is no attribute: getattr(received, "scales", None). What is not the caller's is a view, until combine SEND.
    num_rows: rows received, where flags had HOST_COUNTS; else None.
    """

    tokens: Tensor
    scales: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    expert_counts: Tensor
    rank_counts: Tensor
    expert_offsets: Tensor
    row_source: Tensor
    status: Tensor
    extras: tuple[Tensor | None, ...]
    num_rows: int | None = None

    def __init__(self) -> None:
        self._raw: dict[str, Any] | None = None
        self._seen: tuple[Lease, int, str]  # what views have in common

    def _fill(self, outputs: dict[str, Any], lease: Lease, stream: int, framework: str, num_rows: int) -> None:
        self._raw, self._seen, self.num_rows = outputs, (lease, stream, framework), num_rows if num_rows >= 0 else None

    def __getattr__(self, name: str) -> Any:
        # Views become tensors when they are asked for: most steps ask for a few.
        if name.startswith("_"):
            raise AttributeError(name)
        if self._raw is None:
            raise AttributeError(f"{name} is not there: the dispatch has only been sent, dispatch_recv receives it")
        if name not in self._raw:
            raise AttributeError(f"{name} is not there: this step received {', '.join(self._raw)}")
        raw = self._raw[name]
        value: Any = tuple(one if one is None else self._tensor(one) for one in raw) if name == "extras" else self._tensor(raw)
        setattr(self, name, value)
        return value

    def _tensor(self, raw: Any) -> Tensor:
        if isinstance(raw, Tensor):
            return raw
        hold = Hold(self._seen[0])  # the shape that the view is read with is the routing's
        view = view_of(raw, *self._seen)
        del hold
        return view

    def __repr__(self) -> str:
        return f"a2a.Received({', '.join(self._raw) if self._raw is not None else 'not yet'})"


class Rows(NamedTuple):
    """What travels of a tensor: the sizes after the first, and the element type."""

    sizes: tuple[int, ...]
    dtype: ElementType

    @classmethod
    def of(cls, tensor: Tensor) -> "Rows":
        return cls(tensor.shape[1:], tensor.dtype)


class Sums(NamedTuple):
    """What combine SEND was told of RECV's part already."""

    out: Any = None
    weights_out: Any = None
    status: Any = None
    flags: int = 0


@dataclass
class Step:
    """What is known of a routing's last dispatch."""

    num_tokens: int = 0
    rows: dict[str, Rows] = field(default_factory=dict)  # of the inputs that were given, by name
    extras: Sequence[Rows | None] = ()
    bound: int = 0  # M
    framework: str = ""  # of the tokens
    stream: int = 0  # of the last call, on CUDA
    named: Any = None  # the stream that SEND was given by name
    out: Mapping[str, Any] | None = None  # of SEND, as RECV takes them if it is told nothing else
    want: Sequence[str] | None = None
    sums: Sums = Sums()
    received: Received = field(default_factory=Received)
