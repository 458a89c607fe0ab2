"""The bytes of tensors that stand at one moment, counted on a CPU as a device's allocator would count them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts each storage that an operator made while the mode was on, until it is freed. `largest` are those at the
    peak, as (bytes, operator), for whoever wants to know what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.bytes = 0
        self._held: dict[int, tuple[int, str]] = {}
        self.largest: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), given, str(func))
        return found

    def _see(self, storage: Any, given: set[int], name: str) -> None:
        key = storage._cdata
        if key in given or key in self._held:
            return
        self._held[key] = (storage.nbytes(), name)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self.now > self.bytes:
            self.bytes, self.largest = self.now, sorted(self._held.values(), reverse=True)[:24]

    def _forget(self, key: int) -> None:
        self.now -= self._held.pop(key, (0, ""))[0]


@contextmanager
def peak_of() -> Iterator[Live]:
    """Its `bytes` are those at the peak, of what was made inside."""
    live = Live()
    with live:
        yield live
