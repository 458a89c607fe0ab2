"""Memory of well-known accelerators, for `estimate` on a machine that does not have them."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """One accelerator, with the memory that its driver reports."""

    name: str
    vendor: str
    memory_bytes: int


def apple_working_set(unified_bytes: int) -> int:
    """Bytes that Metal recommends as the most for one process: two thirds of the memory up to 32 GiB, else 3/4.

    An approximation of `recommendedMaxWorkingSetSize`, which only the device itself tells; the lower reported share.
    """
    return unified_bytes * 2 // 3 if unified_bytes <= 32 * GIB else unified_bytes * 3 // 4


KNOWN_GPUS: tuple[KnownGpu, ...] = (
    KnownGpu("NVIDIA T4", "nvidia", 15360 * MIB),
    KnownGpu("NVIDIA V100 16 GB", "nvidia", 16384 * MIB),
    KnownGpu("NVIDIA V100 32 GB", "nvidia", 32768 * MIB),
    KnownGpu("NVIDIA L4", "nvidia", 23034 * MIB),
    KnownGpu("NVIDIA A10G", "nvidia", 23028 * MIB),
    KnownGpu("NVIDIA L40S", "nvidia", 46068 * MIB),
    KnownGpu("NVIDIA RTX 3090", "nvidia", 24576 * MIB),
    KnownGpu("NVIDIA RTX 4090", "nvidia", 24564 * MIB),
    KnownGpu("NVIDIA RTX 5090", "nvidia", 32607 * MIB),
    KnownGpu("NVIDIA A100 40 GB", "nvidia", 40960 * MIB),
    KnownGpu("NVIDIA A100 80 GB", "nvidia", 81920 * MIB),
    KnownGpu("NVIDIA H100 80 GB", "nvidia", 81559 * MIB),
    KnownGpu("NVIDIA H200", "nvidia", 143771 * MIB),
    KnownGpu("AMD Instinct MI210", "amd", 64 * GIB),
    KnownGpu("AMD Instinct MI250 (one die)", "amd", 64 * GIB),
    KnownGpu("AMD Instinct MI300X", "amd", 192 * GIB),
    KnownGpu("AMD Radeon RX 7900 XTX", "amd", 24 * GIB),
    KnownGpu("Apple M-series, 16 GB", "apple", apple_working_set(16 * GIB)),
    KnownGpu("Apple M-series, 32 GB", "apple", apple_working_set(32 * GIB)),
    KnownGpu("Apple M-series, 64 GB", "apple", apple_working_set(64 * GIB)),
    KnownGpu("Apple M-series, 128 GB", "apple", apple_working_set(128 * GIB)),
)
"""As `nvidia-smi` and amdgpu report the totals; Apple: the working set, of unified memory."""
