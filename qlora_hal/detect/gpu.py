"""One accelerator, as the inventory of a machine tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Vendor = Literal["nvidia", "amd", "apple", "intel"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator. None and "" mean that the machine does not tell.

    `compute_capability` is NVIDIA's, `gfx` AMD's target name (`gfx942`). `integrated` shares the host's memory.
    """

    vendor: Vendor
    name: str
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    gfx: str = ""
    driver_version: str = ""
    bus_id: str = ""
    integrated: bool = False
