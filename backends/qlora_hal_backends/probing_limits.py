"""What prebuilt packages and drivers run on: tables of public facts, each with its source, and bf16 in hardware."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from qlora_hal.detect.gpu import Gpu
from qlora_hal.detect.gpu_dtypes import Capability, lacking_dtype
from qlora_hal.detect.hardware import Machine
from qlora_hal_backends.probing_packages import TorchBuild, Version, version_numbers

if TYPE_CHECKING:
    from qlora_hal.contract.values import ComputeDtype

Device = Literal["cuda", "rocm", "mps", "cpu"]

SMALLEST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
"""CUDA major version -> NVIDIA driver branch that runs it. Source: NVIDIA, CUDA Compatibility, table 1."""

ROCM_TARGETS_6 = frozenset(
    {"gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"}
)
ROCM_TARGETS_7 = ROCM_TARGETS_6 | {"gfx950", "gfx1103", "gfx1150", "gfx1151"}
"""Targets of the torch wheels for ROCm. Source: pytorch `.ci/docker/almalinux/build.sh` (PYTORCH_ROCM_ARCH)."""

NEWEST_ROCM: Version = (7, 2)

_BITSANDBYTES_TARGETS = re.compile(r"gfx(908|90a|942|950|1250|101\w|103\w|110\w|115\w|120\w)")
"""Source: README of bitsandbytes 0.50."""

_CPU_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
SMALLEST_MACOS = (14, 0)
"""For torch's Metal device (pytorch#159275, since 2.8), and for the wheels of mlx."""


def cuda_capabilities(build: TorchBuild, architecture: str) -> tuple[Capability, Capability] | None:
    """Lowest and highest compute capability of a torch wheel, None where not known.

    Source: pytorch RELEASE.md, CUDA support matrix (2.8 to 2.11); CUDA 13 wheels carry PTX for anything newer. Wheels
    for arm64 start at 8.0.
    """
    lowest_on_arm = (8, 0) if architecture in {"aarch64", "arm64"} else (0, 0)
    if build.toolkit == (12, 6):
        return max((5, 0), lowest_on_arm), (9, 9)
    if build.toolkit in {(12, 8), (12, 9)}:
        lowest = (7, 5) if version_numbers(build.version) >= (2, 11) else (7, 0)
        return max(lowest, lowest_on_arm), (12, 9)
    if build.toolkit[:1] == (13,):
        return max((7, 5), lowest_on_arm), (99, 9)
    return None


def cuda_wheel_tag(machine: Machine) -> str:
    """The newest torch wheel that this machine's driver and cards run: `cu130`, `cu128` or `cu126`."""
    capabilities = [g.compute_capability for g in machine.gpus_of("nvidia") if g.compute_capability]
    if capabilities and min(capabilities) < (7, 5):
        return "cu126"
    driver = version_numbers(machine.nvidia_driver)[:1]
    if not driver or driver[0] >= SMALLEST_DRIVER[13]:
        return "cu130"
    return "cu128" if capabilities and max(capabilities) >= (10, 0) else "cu126"


def rocm_targets(toolkit: Version) -> frozenset[str]:
    """Targets that both the torch wheel for this ROCm and bitsandbytes are built for."""
    built = ROCM_TARGETS_7 if toolkit >= (7, 0) else ROCM_TARGETS_6
    return frozenset(target for target in built if _BITSANDBYTES_TARGETS.fullmatch(target))


def effective_target(gpu: Gpu, machine: Machine) -> str:
    """The target that ROCm takes the card for: HSA_OVERRIDE_GFX_VERSION=10.3.0 makes any card a gfx1030."""
    override = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", machine.environment.get("HSA_OVERRIDE_GFX_VERSION", ""))
    return f"gfx{int(override[1])}{int(override[2]):x}{int(override[3]):x}" if override else gpu.gfx


def bf16_supported(machine: Machine, device: Device | None = None) -> tuple[bool, str]:
    """Whether the accelerator multiplies in bfloat16 in hardware, and why; of several cards the weakest decides.

    `device` names the one that will be used; by default the first that is there: NVIDIA, AMD, Apple, CPU. This is
    what the data sheets say; computing proves it.
    """
    device = device or _first_device(machine)
    if device == "cuda":
        return _nvidia_bf16(machine.gpus_of("nvidia"))
    if device == "rocm":
        return _amd_bf16(machine)
    if device == "mps":
        if version_numbers(machine.system_version)[:2] >= SMALLEST_MACOS:
            return True, f"{machine.apple_chip} computes in bfloat16 from macOS 14 on."
        return (
            False,
            f"Metal has bfloat16 from macOS 14 on; this machine has {machine.system_version}. Use float16 or float32.",
        )
    found = _CPU_BF16.intersection(machine.cpu.instruction_sets)
    if found:
        return True, f"The processor has {', '.join(sorted(found))}."
    return False, "bf16 has no hardware support on this processor; use float32 compute."


def likely_dtype(machine: Machine, device: Device) -> ComputeDtype | None:
    """What `auto` will most likely become on a device; None where its age is not known."""
    if device == "cpu":
        return "float32"
    if device == "cuda" and not any(gpu.compute_capability for gpu in machine.gpus_of("nvidia")):
        return None
    return "bfloat16" if bf16_supported(machine, device)[0] else "float16"


def _first_device(machine: Machine) -> Device:
    if machine.gpus_of("nvidia"):
        return "cuda"
    if any(not gpu.integrated for gpu in machine.gpus_of("amd")):
        return "rocm"
    return "mps" if machine.gpus_of("apple") else "cpu"


def _nvidia_bf16(gpus: tuple[Gpu, ...]) -> tuple[bool, str]:
    known = [gpu for gpu in gpus if gpu.compute_capability is not None]
    if not known:
        return False, "The compute capability of the NVIDIA GPU is not known; install nvidia-ml-py."
    weakest = min(known, key=lambda gpu: gpu.compute_capability or (0, 0))
    major, minor = weakest.compute_capability or (0, 0)
    if not lacking_dtype("bfloat16", weakest.compute_capability):
        return True, f"{weakest.name} has compute capability {major}.{minor}; bf16 comes with 8.0."
    return False, (
        f"bf16 has no hardware support on {weakest.name}: compute capability {major}.{minor}, 8.0 is needed. "
        "Use float16 with loss scaling, or float32 compute."
    )


def _amd_bf16(machine: Machine) -> tuple[bool, str]:
    cards = [gpu for gpu in machine.gpus_of("amd") if not gpu.integrated] or list(machine.gpus_of("amd"))
    lacking = [gpu for gpu in cards if not gpu.gfx or lacking_dtype("bfloat16", None, gpu.gfx)]
    if cards and not lacking:
        return True, f"{cards[0].name} ({cards[0].gfx}) has bf16 matrix instructions."
    names = ", ".join(f"{gpu.name} ({gpu.gfx})" for gpu in lacking) or "this machine: no AMD GPU was found"
    return False, f"bf16 has no hardware support on {names}. Use float16 with loss scaling, or float32 compute."
