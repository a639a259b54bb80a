"""How ranks meet: one collective, over whatever group an engine has.

Three kinds are known: vLLM's StatelessProcessGroup (`all_gather_obj`), any object with `all_gather_object`
(engine.ProcessGroup), and torch's ProcessGroup. A store alone makes a group of the second kind: StoreGroup.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Protocol


class Store(Protocol):
    """torch's Store, and anything like it."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> str | bytes:
        """Waits until the key is there."""


class StoreGroup:
    """A group over a store that all its ranks reach. Values stay in the store: it is for set-up."""

    def __init__(self, rank: int, size: int, store: Store, prefix: str = "a2a"):
        self._rank, self._size, self._store, self._prefix, self._round = rank, size, store, prefix, 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def all_gather_object(self, value: Any) -> list:
        self._round += 1
        key = f"{self._prefix}/{self._round}/"
        self._store.set(key + str(self._rank), json.dumps(value))
        return [json.loads(self._store.get(key + str(rank))) for rank in range(self._size)]


def member(group, of: str) -> int:
    """`rank` or `size` of a group: a method with torch and engine.ProcessGroup, an attribute with vLLM's."""
    found = getattr(group, of, None)
    found = getattr(group, "world_size") if found is None else found
    return found() if callable(found) else found


def gather(group, value: Any) -> list:
    """Collective: every rank's value, rank ascending. Values are what JSON has."""
    if group is None:
        return [value]  # of a group of one rank
    own = getattr(group, "all_gather_obj", None) or getattr(group, "all_gather_object", None)
    if own is not None:
        return own(value)
    import torch.distributed

    values = [None] * member(group, "size")
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def host() -> str:
    """The same for ranks that share memory, and for no others."""
    return socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
