"""Which of several ranks a process is; imports nothing heavy, for a spec is read without NumPy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """Which share of the work this process has. One process is `World(0, 1)`; `local_rank` counts on one host, which
    has `local_size` of the ranks, None where nothing tells."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None

    @property
    def most_on_host(self) -> int:
        """Ranks that share the memory of this host: as many as it has, or all where that is not known."""
        return self.size if self.local_size is None else self.local_size


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a trainer knows of how its ranks are joined. `collectives` names what carries the sums, `links` what joins
    the devices of this host (`NVLink`, `PCIe`, `unknown` where it cannot be told), `seconds` how long this process has
    been in collectives since it joined: transfer and waiting for slower ranks alike, on the host's clock."""

    collectives: str = ""
    links: str = "unknown"
    seconds: float = 0.0
