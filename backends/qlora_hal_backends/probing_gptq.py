"""Can GPTQ checkpoints be trained here: one engine that fits its surroundings, and torch on a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.detect.hardware import Machine, inventory
from qlora_hal_backends.gptq_int4.engines import ENGINES, GPTQMODEL, engine_obstacle
from qlora_hal_backends.probing_devices import Obstacle, Place, amd_is_there, cpu_is_usable, nvidia_is_there
from qlora_hal_backends.probing_limits import Device, likely_dtype
from qlora_hal_backends.probing_packages import InstalledPackages, Packages, torch_build
from qlora_hal_backends.probing_torch import (
    cards_are_in_the_cuda_wheel,
    cards_have_a_rocm_wheel,
    driver_runs_the_toolkit,
    usable_gpus,
)

LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes")
"""What every engine is run with; the versions are the engine's to ask for."""

_GPU_CHECKS: Mapping[Device, tuple[Callable[[Place], Obstacle | None], ...]] = {
    "cuda": (nvidia_is_there, driver_runs_the_toolkit, cards_are_in_the_cuda_wheel),
    "rocm": (amd_is_there, cards_have_a_rocm_wheel),
}
"""By what torch was built for. bitsandbytes' own GPU library is not asked for: GPTQ weights do not pass through it."""


def probe_gptq(
    backend_name: str = "gptq_int4", *, packages: Packages | None = None, machine: Machine | None = None
) -> ProbeReport:
    """Whether the backend can run, and on what: the GPU that the installed torch drives, else the CPU."""
    packages, machine = packages or InstalledPackages(), machine or inventory()
    versions = _versions(packages)
    if obstacle := _packages_fit(packages):
        return ProbeReport(backend_name, obstacle.availability, obstacle.reason, obstacle.fix, versions=versions)
    engine = next(engine for engine in ENGINES.values() if not engine_obstacle(engine, packages.version))
    device, gpus, why_not = _device(packages, machine)
    if device == "cpu" and (obstacle := cpu_is_usable(Place("cpu", packages, machine))):
        return ProbeReport(backend_name, obstacle.availability, obstacle.reason, obstacle.fix, versions=versions)
    here = ", ".join(gpus) or f"{machine.cpu.name or machine.architecture}, {machine.cpu.logical_cores} cores"
    reason = f"{here}; {engine.distribution} {packages.version(engine.distribution)}."
    if why_not:
        reason += f" On the CPU, because: {why_not}"
    return ProbeReport(
        backend_name,
        Availability.READY,
        reason,
        devices=gpus or (here,),
        versions=versions,
        uses_accelerator=device != "cpu",
        device_kind=device,
        compute_dtype=likely_dtype(machine, device),
        notes=tuple(other.needed_for for other in ENGINES.values() if other is not engine and other.needed_for),
    )


def _packages_fit(packages: Packages) -> Obstacle | None:
    missing = [name for name in LIBRARIES if packages.version(name) is None]
    obstacles = [engine_obstacle(engine, packages.version) for engine in ENGINES.values()]
    if not missing and not all(obstacles):
        return None
    if missing:
        return Obstacle(Availability.MISSING_PACKAGE, f"Not installed: {', '.join(missing)}.", GPTQMODEL.install)
    absent = all(packages.version(engine.distribution) is None for engine in ENGINES.values())
    kind = Availability.MISSING_PACKAGE if absent else Availability.WRONG_BUILD
    return Obstacle(kind, f"No GPTQ engine can be used: {'; '.join(obstacles)}.", GPTQMODEL.install)


def _device(packages: Packages, machine: Machine) -> tuple[Device, tuple[str, ...], str]:
    """(device, names of its GPUs, why a GPU that is there is not used)."""
    build = torch_build(packages)
    kind: Device | None = (
        "cuda" if build and build.kind == "cuda" else "rocm" if build and build.kind == "rocm" else None
    )
    if kind is None:
        cards = [gpu.name for gpu in (*machine.gpus_of("nvidia"), *machine.gpus_of("amd")) if not gpu.integrated]
        version = build.version if build else "missing"
        return "cpu", (), f"torch {version} has no GPU code for {', '.join(cards)}." if cards else ""
    place = Place(kind, packages, machine)
    for check in _GPU_CHECKS[kind]:
        if obstacle := check(place):
            return "cpu", (), obstacle.reason
    return kind, tuple(gpu.name for gpu in usable_gpus(place)), ""


def _versions(packages: Packages) -> dict[str, str]:
    names = (*LIBRARIES, *(engine.distribution for engine in ENGINES.values()))
    return {name: version for name in names if (version := packages.version(name))}
