"""Which of several ranks a process is; imports nothing heavy, for a spec is read without NumPy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """Which share of the work this process has. One process is `World(0, 1)`; `local_rank` counts on one host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
