"""The packed base spread over ranks: each keeps every so many-th byte of a module's stored arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from .ranks import Gather, Ranks
from .storage import Stored


def spread_and_gathered(stored: Stored, ranks: Ranks, gather: Gather) -> Stored:
    """What all ranks hold together, after each let go of all but its part."""
    found: Stored = _each_array(stored, _Crossing(ranks, gather))
    return found


@dataclass(frozen=True, slots=True)
class _Crossing:
    ranks: Ranks
    gather: Gather

    def __call__(self, array: Any) -> Any:
        world = self.ranks.world
        parts = self.gather(self.ranks, array.tobytes()[world.rank :: world.size])
        whole = bytearray(array.nbytes)
        for rank, part in enumerate(parts):
            whole[rank :: world.size] = part
        return np.frombuffer(bytes(whole), array.dtype).reshape(array.shape)


def _each_array(value: Any, crossing: _Crossing) -> Any:
    """The arrays of a stored weight, and of what it is made of, crossed; all else as it is."""
    if isinstance(value, np.ndarray):
        return crossing(value)
    if isinstance(value, dict):
        return {name: _each_array(part, crossing) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        kept = {n: v for n, v in held.items() if isinstance(v, np.ndarray | dict) or is_dataclass(v)}
        return replace(value, **{name: _each_array(part, crossing) for name, part in kept.items()})
    return value
