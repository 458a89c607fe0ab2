"""Is the device there, and does the system under it fit? The part of a probe that needs no package."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_hal.contract.backend import Availability
from qlora_hal.detect.hardware import Machine
from qlora_hal_backends.probing_limits import SMALLEST_MACOS, Device
from qlora_hal_backends.probing_packages import Packages, TorchBuild, torch_build, version_numbers


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a backend cannot run, and one thing to do."""

    availability: Availability
    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class Place:
    """What the checks look at."""

    device: Device
    packages: Packages
    machine: Machine

    @property
    def build(self) -> TorchBuild:
        build = torch_build(self.packages)
        assert build is not None, "the check for missing packages comes first"
        return build


def no_device(reason: str, fix: str = "Choose another backend, or a machine that has one.") -> Obstacle:
    return Obstacle(Availability.NO_DEVICE, reason, fix)


def _hidden_by(machine: Machine, *names: str) -> str:
    """The variable that hides every device, or "": empty, or an index that is none."""
    values = {name: machine.environment[name].strip() for name in names if name in machine.environment}
    return next((name for name, value in values.items() if value in {"", "-1", "NoDevFiles"}), "")


def nvidia_is_there(place: Place) -> Obstacle | None:
    machine = place.machine
    if machine.system == "Darwin":
        return no_device("macOS has no CUDA.")
    if hidden := _hidden_by(machine, "CUDA_VISIBLE_DEVICES"):
        value = machine.environment[hidden]
        return no_device(f"{hidden}={value!r} hides every NVIDIA GPU.", f"Unset {hidden}.")
    if machine.gpus_of("nvidia"):
        return None
    if "nvidia" in machine.unusable_cards or machine.nvidia_driver:
        why = f" ({machine.notes[0].rstrip('.')})" if machine.notes else ""
        return no_device(
            f"An NVIDIA GPU is on the bus, but its driver does not respond{why}.",
            "Install or repair the NVIDIA driver until nvidia-smi lists the GPU.",
        )
    return no_device("No NVIDIA GPU was found.")


def amd_is_there(place: Place) -> Obstacle | None:
    machine = place.machine
    if machine.system != "Linux":
        return no_device(f"AMD GPUs are supported on Linux; this machine runs {machine.system}.")
    if hidden := _hidden_by(machine, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        return no_device(f"{hidden}={machine.environment[hidden]!r} hides every AMD GPU.", f"Unset {hidden}.")
    if machine.gpus_of("amd"):
        return None
    if "amd" in machine.unusable_cards:
        return no_device(
            "An AMD GPU is on the bus, but the kernel's compute driver does not offer it "
            f"({'/dev/kfd is there' if machine.has_kfd else 'no /dev/kfd'}).",
            "Load the amdgpu driver with ROCm support; in a container pass --device /dev/kfd --device /dev/dri.",
        )
    return no_device("No AMD GPU was found.")


def apple_is_there(place: Place) -> Obstacle | None:
    return apple_silicon(place.machine) if place.machine.system == "Darwin" else no_device("Metal needs a Mac.")


def apple_silicon(machine: Machine) -> Obstacle | None:
    if machine.architecture != "arm64":
        return no_device(f"Metal training needs Apple silicon; this Mac has an Intel processor ({machine.cpu.name}).")
    return _not_under_rosetta(machine) or _macos_is_recent(machine)


def _not_under_rosetta(machine: Machine) -> Obstacle | None:
    if not machine.is_rosetta:
        return None
    return Obstacle(
        Availability.WRONG_BUILD,
        f"This Python is built for x86_64 and runs under Rosetta on {machine.apple_chip or 'Apple silicon'}: "
        "no Metal, and no wheels of a current torch or mlx.",
        "Install an arm64 Python (python.org, Homebrew, or conda for osx-arm64) and make a new environment with it.",
    )


def _macos_is_recent(machine: Machine) -> Obstacle | None:
    if version_numbers(machine.system_version)[:2] >= SMALLEST_MACOS:
        return None
    return Obstacle(
        Availability.WRONG_BUILD,
        f"macOS {machine.system_version} is too old: torch and mlx need macOS 14.0 for the GPU.",
        "Update macOS to 14 or newer.",
    )


def cpu_is_usable(place: Place) -> Obstacle | None:
    machine = place.machine
    if rosetta := _not_under_rosetta(machine):
        return rosetta
    if machine.system == "Darwin" and machine.architecture != "arm64" and torch_build(place.packages) is None:
        return no_device("torch 2.8 and newer have no wheels for Macs with Intel processors.", "Use a Linux machine.")
    return None
