"""Can MLX run here: Apple silicon, or Linux with its CPU or CUDA library."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_hal.contract.backend import Availability
from qlora_hal.detect.hardware import Machine
from qlora_hal.errors.installation import install_line, pip, requirement
from qlora_hal_backends.probing_devices import Obstacle, apple_silicon, no_device
from qlora_hal_backends.probing_limits import SMALLEST_DRIVER
from qlora_hal_backends.probing_packages import Packages, version_numbers, versions_out_of_range

MLX_FAMILY: Mapping[str, str] = {"mlx": "0.32", "mlx-lm": "0.32"}
"""Distribution -> lowest version; the same as the extra `mlx` of pyproject.toml."""

MLX_LIBRARIES = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")


def mlx_device(packages: Packages, machine: Machine) -> Obstacle | str:
    """The device that MLX will compute on, or what stands in the way."""
    return _mlx_on_apple(packages, machine) if machine.system == "Darwin" else _mlx_on_linux(packages, machine)


def _mlx_on_apple(packages: Packages, machine: Machine) -> Obstacle | str:
    obstacle = apple_silicon(machine) or _mlx_is_installed(packages, "mlx")
    return obstacle or f"{machine.apple_chip} (Metal)"


def _mlx_on_linux(packages: Packages, machine: Machine) -> Obstacle | str:
    if machine.system != "Linux":
        return no_device(f"mlx has no wheels for {machine.system}.")
    if missing := _mlx_is_installed(packages, "mlx-cpu"):
        return missing
    toolkit = next((major for major in (13, 12) if packages.version(f"mlx-cuda-{major}")), None)
    if toolkit is None:
        if packages.version("mlx-cpu"):
            return f"CPU ({machine.cpu.name or machine.architecture})"
        return Obstacle(
            Availability.WRONG_BUILD,
            "mlx is installed without a library to compute with: neither mlx-cpu nor mlx-cuda-12 nor mlx-cuda-13.",
            install_line("mlx-cpu"),
        )
    return _mlx_on_nvidia(machine, toolkit)


def _mlx_on_nvidia(machine: Machine, toolkit: int) -> Obstacle | str:
    gpus = machine.gpus_of("nvidia")
    if not gpus:
        return Obstacle(
            Availability.WRONG_BUILD,
            f"mlx-cuda-{toolkit} is installed, but no NVIDIA GPU was found.",
            f"{pip(f'uninstall -y mlx-cuda-{toolkit}')} && {install_line('mlx-cpu')}",
        )
    branch, needed = version_numbers(machine.nvidia_driver), SMALLEST_DRIVER[toolkit]
    if branch and branch[0] < needed:
        return Obstacle(
            Availability.WRONG_BUILD,
            f"The NVIDIA driver is too old: {machine.nvidia_driver} is installed, mlx-cuda-{toolkit} needs {needed}.",
            f"Update the driver to {needed} or newer.",
        )
    return f"{gpus[0].name} (CUDA {toolkit})"


def _mlx_is_installed(packages: Packages, extra: str) -> Obstacle | None:
    missing = [name for name in MLX_FAMILY if packages.version(name) is None]
    if missing:
        return Obstacle(Availability.MISSING_PACKAGE, f"Not installed: {', '.join(missing)}.", install_line(extra))
    if wrong := versions_out_of_range(packages, MLX_FAMILY, {}):
        return Obstacle(Availability.WRONG_BUILD, wrong, pip(f"install -U {requirement(extra)}"))
    return None
