"""Can a backend run here? Told from package metadata and the machine's inventory, without importing what it runs on.

A probe is a row of checks; the first that finds an obstacle answers with a reason and one fix. Order matters: a
missing device comes before missing packages, so that nobody is sent to install CUDA on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.detect.hardware import Machine, inventory
from qlora_hal_backends.probing_devices import (
    Obstacle,
    Place,
    amd_is_there,
    apple_is_there,
    cpu_is_usable,
    nvidia_is_there,
)
from qlora_hal_backends.probing_limits import Device, likely_dtype
from qlora_hal_backends.probing_mlx import MLX_FAMILY, MLX_LIBRARIES, mlx_device
from qlora_hal_backends.probing_packages import InstalledPackages, Packages
from qlora_hal_backends.probing_torch import (
    TORCH_FAMILY,
    bitsandbytes_has_the_cpu_library,
    bitsandbytes_has_the_library,
    cards_are_in_the_cuda_wheel,
    cards_have_a_rocm_wheel,
    driver_runs_the_toolkit,
    packages_are_there,
    torch_fits_the_device,
    usable_gpus,
)

__all__ = ["probe_here", "probe_mlx", "probe_torch"]

_CHECKS: Mapping[Device, tuple[Callable[[Place], Obstacle | None], ...]] = {
    "cuda": (
        nvidia_is_there,
        packages_are_there,
        torch_fits_the_device,
        driver_runs_the_toolkit,
        cards_are_in_the_cuda_wheel,
        bitsandbytes_has_the_library,
    ),
    "rocm": (
        amd_is_there,
        cards_have_a_rocm_wheel,
        packages_are_there,
        torch_fits_the_device,
        bitsandbytes_has_the_library,
    ),
    "mps": (apple_is_there, packages_are_there, bitsandbytes_has_the_cpu_library),
    "cpu": (cpu_is_usable, packages_are_there, bitsandbytes_has_the_cpu_library),
}


def probe_here(platform_name: str, device: Device) -> ProbeReport:
    """`probe_torch` on this machine with this interpreter's packages."""
    return probe_torch(platform_name, device=device, packages=InstalledPackages(), machine=inventory())


def probe_torch(platform_name: str, *, device: Device, packages: Packages, machine: Machine) -> ProbeReport:
    """Whether the torch backend `platform_name` can run on `device` of this machine with these packages."""
    place = Place(device, packages, machine)
    versions = _versions(packages, TORCH_FAMILY)
    for check in _CHECKS[device]:
        if obstacle := check(place):
            return _refusal(platform_name, obstacle, versions)
    devices, build = _device_names(place), place.build
    if build.toolkit:
        versions[build.kind] = ".".join(map(str, build.toolkit))
    if device == "cuda" and machine.nvidia_driver:
        versions["driver"] = machine.nvidia_driver
    reason = f"{', '.join(devices)}; torch {build.version} ({build.toolkit_name})."
    return ProbeReport(
        platform_name,
        Availability.READY,
        reason,
        devices=devices,
        versions=versions,
        device_kind=device,
        compute_dtype=likely_dtype(machine, device),
    )


def probe_mlx(
    backend_name: str = "mlx_lora", *, packages: Packages | None = None, machine: Machine | None = None
) -> ProbeReport:
    """Whether MLX can run here: on Apple silicon, or on Linux with its CPU or CUDA library."""
    packages, machine = packages or InstalledPackages(), machine or inventory()
    versions = _versions(packages, (*MLX_FAMILY, *MLX_LIBRARIES))
    found = mlx_device(packages, machine)
    if isinstance(found, Obstacle):
        return _refusal(backend_name, found, versions)
    reason = f"{found}; mlx {versions['mlx']}."
    return ProbeReport(backend_name, Availability.READY, reason, devices=(found,), versions=versions)


def _refusal(name: str, obstacle: Obstacle, versions: Mapping[str, str]) -> ProbeReport:
    return ProbeReport(name, obstacle.availability, obstacle.reason, obstacle.fix, versions=versions)


def _device_names(place: Place) -> tuple[str, ...]:
    machine = place.machine
    if place.device == "cpu":
        return (f"{machine.cpu.name or machine.architecture}, {machine.cpu.logical_cores} cores",)
    gpus = machine.gpus_of("apple") if place.device == "mps" else usable_gpus(place)
    return tuple(gpu.name for gpu in gpus)


def _versions(packages: Packages, names: Iterable[str]) -> dict[str, str]:
    return {name: version for name in names if (version := packages.version(name))}
