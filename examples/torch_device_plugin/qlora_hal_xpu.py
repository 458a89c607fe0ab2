"""Intel GPUs through `torch.xpu`: a torch device is one record and a probe. Not run on this hardware by its authors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Feature
from qlora_hal_backends.torch_family.platform import (
    EVERYWHERE,
    MEMORY,
    OUTLINE,
    TORCH_OPTIONS,
    TorchPlatform,
    memory_of,
)

NAME, TITLE, DTYPES = "xpu_bnb", "bitsandbytes on Intel XPU", ("bfloat16", "float16", "float32")
XPU = TorchPlatform(NAME, TITLE, "xpu", "xpu", 90, DTYPES, EVERYWHERE | {Feature.PEAK_MEMORY}, optimizer_notes={})


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return ProbeReport(NAME, Availability.MISSING_PACKAGE, "torch is not installed.", "Install torch for XPU.")
    if "+xpu" not in build:
        return ProbeReport(NAME, Availability.WRONG_BUILD, f"torch {build} is not for XPU.", "Install torch for XPU.")
    if not list(Path("/dev/dri").glob("renderD*")):
        return ProbeReport(NAME, Availability.NO_DEVICE, "No Intel GPU was found.", "Install its driver and retry.")
    return ProbeReport(NAME, Availability.READY, "An Intel GPU.", versions={"torch": build}, device_kind="xpu")


def open_trainer() -> Any:
    from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

    return TorchLoRATrainer(SPEC, XPU)


SPEC = BackendSpec(
    NAME, TITLE, XPU.priority, XPU.capabilities(), probe, "qlora_hal_xpu:open_trainer", contract=2,
    outline=OUTLINE, option_choices=TORCH_OPTIONS, memory=memory_of(MEMORY, fused=False),
)  # fmt: skip
