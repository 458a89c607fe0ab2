"""Do the installed packages fit the device? Versions, torch's build, driver, architectures, native libraries."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qlora_hal.contract.backend import Availability
from qlora_hal.detect.gpu import Gpu
from qlora_hal.errors.installation import install_line, pip, requirement
from qlora_hal_backends.probing_devices import Obstacle, Place, no_device
from qlora_hal_backends.probing_limits import (
    NEWEST_ROCM,
    SMALLEST_DRIVER,
    Device,
    cuda_capabilities,
    cuda_wheel_tag,
    effective_target,
    rocm_targets,
)
from qlora_hal_backends.probing_packages import (
    Packages,
    TorchBuild,
    Version,
    has_cpu_library,
    matching_library,
    native_versions,
    torch_build,
    version_numbers,
    versions_out_of_range,
)

TORCH_FAMILY: Mapping[str, str] = {
    "torch": "2.8",
    "transformers": "5.10.1",
    "accelerate": "1.10",
    "bitsandbytes": "0.50",
}
"""Distribution -> lowest version; the same as the extra `torch-family` of pyproject.toml."""

TOO_NEW: Mapping[str, str] = {"transformers": "6"}

_EXTRA: Mapping[Device, str] = {"cuda": "cuda", "rocm": "rocm", "mps": "torch-family", "cpu": "cpu"}
_TORCH_INDEX = "https://download.pytorch.org/whl"
_ROCM_WHEEL = "rocm7.2"
_REINSTALL_BITSANDBYTES = pip("install --force-reinstall --no-deps 'bitsandbytes>=0.50'")


def packages_are_there(place: Place) -> Obstacle | None:
    packages = place.packages
    if fork := _old_rocm_fork(packages):
        return fork
    missing = [name for name in TORCH_FAMILY if packages.version(name) is None]
    if missing:
        return Obstacle(
            Availability.MISSING_PACKAGE, f"Not installed: {', '.join(missing)}.", _install_line(place, missing)
        )
    if wrong := versions_out_of_range(packages, TORCH_FAMILY, TOO_NEW):
        return Obstacle(Availability.WRONG_BUILD, wrong, pip(f"install -U {requirement(_EXTRA[place.device])}"))
    return None


def _install_line(place: Place, missing: list[str]) -> str:
    line = install_line(_EXTRA[place.device])
    # PyPI has torch for CUDA on Linux and for the CPU elsewhere; everything else comes from torch's own index.
    on_pypi = place.device in {"mps", "cpu"} or (place.device == "cuda" and place.machine.system == "Linux")
    wants_old_cuda = place.device == "cuda" and cuda_wheel_tag(place.machine) != "cu130"
    if "torch" in missing and (not on_pypi or wants_old_cuda):
        return f"{pip(f'install torch --index-url {_TORCH_INDEX}/{_wheel_tag(place)}')} && {line}"
    return line


def _reinstall_torch(wheel_tag: str) -> str:
    return pip(f"install --force-reinstall torch --index-url {_TORCH_INDEX}/{wheel_tag}")


def _wheel_tag(place: Place) -> str:
    return {"cuda": cuda_wheel_tag(place.machine), "rocm": _ROCM_WHEEL}.get(place.device, "cpu")


def _old_rocm_fork(packages: Packages) -> Obstacle | None:
    """bitsandbytes brings ROCm libraries itself since 0.49; forks from before shadow it under the same import name."""
    fork = packages.version("bitsandbytes-rocm")
    own = packages.version("bitsandbytes") or ""
    if fork is None and not ("rocm" in own.partition("+")[2] and version_numbers(own) < (0, 49)):
        return None
    name = f"bitsandbytes-rocm {fork}" if fork else f"bitsandbytes {own}"
    distribution = "bitsandbytes-rocm" if fork else "bitsandbytes"
    return Obstacle(
        Availability.WRONG_BUILD,
        f"{name} is a fork from before 0.49; the official bitsandbytes has ROCm libraries itself since then.",
        f"{pip(f'uninstall -y {distribution}')} && {_REINSTALL_BITSANDBYTES}",
    )


def torch_fits_the_device(place: Place) -> Obstacle | None:
    build, wanted = place.build, place.device
    if build.kind == wanted:
        return None
    gpu = place.machine.gpus_of("nvidia" if wanted == "cuda" else "amd")[0]
    built_for = {"cpu": "has no GPU code", "rocm": "is built for AMD GPUs", "cuda": "is built for NVIDIA GPUs"}
    return Obstacle(
        Availability.WRONG_BUILD,
        f"torch {build.version} ({build.toolkit_name}) {built_for.get(build.kind, 'is built for another device')}, "
        f"but this machine has {gpu_name(gpu)}.",
        _reinstall_torch(_wheel_tag(place)),
    )


# NVIDIA: driver and architecture ------------------------------------------------------------------------------------
def driver_runs_the_toolkit(place: Place) -> Obstacle | None:
    build, installed = place.build, place.machine.nvidia_driver
    needed = SMALLEST_DRIVER.get(build.toolkit[0]) if build.toolkit else None
    branch = version_numbers(installed)
    if needed is None or not branch or branch[0] >= needed:
        return None
    return Obstacle(
        Availability.WRONG_BUILD,
        f"The NVIDIA driver is too old: {installed} is installed, torch {build.version} is built with "
        f"{build.toolkit_name}, which needs {needed} or newer.",
        f"Update the driver to {needed} or newer, or: {_reinstall_torch(cuda_wheel_tag(place.machine))}",
    )


def cards_are_in_the_cuda_wheel(place: Place) -> Obstacle | None:
    built = cuda_capabilities(place.build, place.machine.architecture)
    if built is None or usable_gpus(place):
        return None
    (low, high), cards = built, place.machine.gpus_of("nvidia")
    listing = ", ".join(gpu_name(gpu) for gpu in cards)
    upper = "newer" if high[0] >= 99 else f"{high[0]}.{high[1]}"
    tag = cuda_wheel_tag(place.machine)
    return Obstacle(
        Availability.WRONG_BUILD,
        f"torch {place.build.version} ({place.build.toolkit_name}) is built for compute capability {low[0]}.{low[1]} "
        f"to {upper}; this machine has {listing}.",
        _reinstall_torch(tag),
    )


# AMD: architecture --------------------------------------------------------------------------------------------------
def cards_have_a_rocm_wheel(place: Place) -> Obstacle | None:
    """Comes before the packages: nobody is sent to install a torch that has no code for the card."""
    build = torch_build(place.packages)
    if build is not None and build.kind == "rocm":
        usable, targets = usable_gpus(place), rocm_targets(build.toolkit)
    else:
        targets = rocm_targets(NEWEST_ROCM)
        usable = tuple(g for g in place.machine.gpus_of("amd") if effective_target(g, place.machine) in targets)
    if usable:
        return None
    gpus = place.machine.gpus_of("amd")
    cards = ", ".join(gpu_name(gpu) for gpu in gpus)
    built = f"The public torch and bitsandbytes for ROCm are built for {', '.join(sorted(targets))}"
    if all(gpu.integrated for gpu in gpus):
        return no_device(f"{built}; the only AMD GPU here is integrated: {cards}.")
    return Obstacle(
        Availability.WRONG_BUILD,
        f"{built}; this machine has {cards}.",
        "Choose another backend (qlora-hal backends), or build torch and bitsandbytes for this GPU from source.",
    )


# bitsandbytes -------------------------------------------------------------------------------------------------------
def bitsandbytes_has_the_library(place: Place) -> Obstacle | None:
    build, kind = place.build, place.device
    assert kind in ("cuda", "rocm")
    available = native_versions(place.packages, kind)
    variable = "BNB_ROCM_VERSION" if kind == "rocm" else "BNB_CUDA_VERSION"
    override = place.machine.environment.get(variable, "")
    if override:
        library = f"libbitsandbytes_{kind}{override}"
        if any(name.startswith(library + ".") for name in available.values()):
            return None
        return _no_library(place, f"{library} (requested by {variable}={override})", available, f"Unset {variable}.")
    if not build.toolkit or matching_library(available, build.toolkit):
        return None
    library = f"libbitsandbytes_{kind}{''.join(map(str, build.toolkit))}"
    wanted = f"{library} for the {build.toolkit_name} of torch {build.version}"
    return _no_library(place, wanted, available, _REINSTALL_BITSANDBYTES)


def _no_library(place: Place, library: str, available: Mapping[Version, str], fix: str) -> Obstacle:
    has = ", ".join(available[version] for version in sorted(available)) or "none of this kind"
    version = place.packages.version("bitsandbytes")
    return Obstacle(
        Availability.WRONG_BUILD, f"bitsandbytes {version} is missing its native library {library}; it has {has}.", fix
    )


def bitsandbytes_has_the_cpu_library(place: Place) -> Obstacle | None:
    if has_cpu_library(place.packages):
        return None
    version = place.packages.version("bitsandbytes")
    return Obstacle(
        Availability.WRONG_BUILD,
        f"bitsandbytes {version} is missing its native library libbitsandbytes_cpu.",
        _REINSTALL_BITSANDBYTES,
    )


# what can be used ---------------------------------------------------------------------------------------------------
def usable_gpus(place: Place) -> tuple[Gpu, ...]:
    """The GPUs of the device's vendor that the installed torch has code for; all of them when it is no public wheel."""
    build, machine = place.build, place.machine
    gpus = machine.gpus_of("nvidia" if place.device == "cuda" else "amd")
    if not _is_public_wheel(build):
        return gpus
    if place.device == "rocm":
        targets = rocm_targets(build.toolkit)
        return tuple(gpu for gpu in gpus if effective_target(gpu, machine) in targets)
    built = cuda_capabilities(build, machine.architecture)
    if built is None:
        return gpus
    return tuple(g for g in gpus if g.compute_capability is None or built[0] <= g.compute_capability <= built[1])


def _is_public_wheel(build: TorchBuild) -> bool:
    """Whether the version is one that torch's own index or PyPI carries, and so its list of architectures is known."""
    return re.fullmatch(r"[\d.]+(?:\+(?:cu\d+|rocm\d+\.\d+(?:\.\d+)?))?", build.version) is not None


def gpu_name(gpu: Gpu) -> str:
    """The name with what decides about builds: compute capability or target."""
    if gpu.compute_capability:
        major, minor = gpu.compute_capability
        return f"{gpu.name} (compute capability {major}.{minor})"
    return f"{gpu.name} ({gpu.gfx})" if gpu.gfx and gpu.gfx not in gpu.name else gpu.name
