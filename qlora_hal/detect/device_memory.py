"""The device of this machine that a backend would train on: its memory, its generation, what its host has left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_hal.detect.gpu_dtypes import dtype_refused, lacking_dtype_of
from qlora_hal.detect.hardware import inventory, memory_available_here, memory_here
from qlora_hal.detect.selection import has_accelerator
from qlora_hal.memory.gpus import DEVICE_KINDS, apple_working_set
from qlora_hal.memory.placement import HOST_SPARED

if TYPE_CHECKING:
    from qlora_hal.contract.backend import BackendSpec, ProbeReport
    from qlora_hal.detect.gpu import Gpu
    from qlora_hal.detect.hardware import Machine


def cards_of(spec: BackendSpec, report: ProbeReport, machine: Machine | None = None) -> list[Gpu]:
    """The cards that the backend can run on, none where it computes on the processor; the one with the most memory
    first, which is most often the one that a library opens first."""
    if not has_accelerator(spec, (report,)):
        return []
    kind = report.device_kind
    mine = (
        gpu
        for gpu in (machine or inventory()).gpus
        if gpu.vendor in spec.card_vendors and kind in ("", DEVICE_KINDS.get(gpu.vendor, ""))
    )
    return sorted(mine, key=lambda gpu: gpu.memory_total_bytes or 0, reverse=True)


def device_memory(spec: BackendSpec, report: ProbeReport, machine: Machine | None = None) -> int | None:
    """Bytes of the device that the backend would train on here: of the first of its cards, or what a process of this
    machine can have. None where the machine does not tell."""
    if not has_accelerator(spec, (report,)):
        return memory_here(machine)
    for gpu in cards_of(spec, report, machine)[:1]:
        size = gpu.memory_total_bytes
        return apple_working_set(size) if gpu.vendor == "apple" and size else size
    return None


def refuse_absent_dtype(asked: str, spec: BackendSpec, report: ProbeReport) -> None:
    """Before anything is loaded. Raises UnsupportedFeatureError QH-B01 for `fp8` and ConfigError QH-N10 for another
    `quantization.compute_dtype` that no card here computes in, by its generation."""
    cards = cards_of(spec, report)
    reasons = [reason for gpu in cards if (reason := lacking_dtype_of(asked, gpu))]
    if reasons and len(reasons) == len(cards):
        raise dtype_refused(asked, f"{cards[0].name} is of {reasons[0]}")


def host_memory_left() -> int:
    """Bytes of this machine's memory that what waits on the host may take now, the rest of the run spared."""
    return int(memory_available_here() * (1 - HOST_SPARED))
