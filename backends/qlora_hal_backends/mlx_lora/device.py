"""The device that MLX computes on: what it is called, what it can, how much memory it may take."""

from __future__ import annotations

import importlib.metadata
import platform as python_platform
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from qlora_hal.contract.backend import DeviceFacts

_PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "transformers", "numpy")


def is_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu)


def device_information() -> Mapping[str, str | int]:
    found: Mapping[str, str | int] = mx.device_info()
    return found


def memory_limit_bytes() -> int | None:
    """What Metal recommends to keep wired: less than the Mac's memory. None where MLX names no limit."""
    limit = device_information().get("max_recommended_working_set_size")
    return int(limit) if limit else None


def respect_memory_limit() -> None:
    """Keep the model resident, and let MLX wait for running work rather than ask for more than Metal recommends."""
    limit = memory_limit_bytes()
    if limit is not None and mx.metal.is_available():
        mx.set_wired_limit(limit)
        mx.set_memory_limit(limit)


def describe_device(kernel_path: str) -> DeviceFacts:
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    versions["python"] = python_platform.python_version()
    information = device_information()
    name = str(information.get("device_name") or information.get("architecture") or python_platform.machine())
    return DeviceFacts(
        device=f"{name} ({_device_kind()})",
        versions=versions,
        kernel_path=kernel_path,
        driver=python_platform.mac_ver()[0],
        memory_limit_bytes=memory_limit_bytes(),
    )


def _device_kind() -> str:
    if is_cpu():
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def proved_dtypes() -> tuple[str, ...]:
    """The compute dtypes in which a product is right within its own rounding, best first.

    A product of k = 64 terms rounded once is within u of the exact one, u = 2^-8 (bfloat16), 2^-24 (float32); float32
    accumulation adds 64 * 2^-24. Twice that is allowed. On a CPU bfloat16 is emulated: right numbers, at a fraction of
    the speed, so float32 comes first there.
    """
    order = ("float32", "bfloat16") if is_cpu() else ("bfloat16", "float32")
    return tuple(name for name in order if _computes(name))


def _computes(name: str) -> bool:
    dtype, unit_roundoff = (mx.bfloat16, 2.0**-8) if name == "bfloat16" else (mx.float32, 2.0**-24)
    generator = np.random.default_rng(0)
    left, right = (mx.array(generator.random((64, 64)).astype(np.float32)).astype(dtype) for _ in range(2))
    exact = np.array(left.astype(mx.float32), np.float64) @ np.array(right.astype(mx.float32), np.float64)
    try:
        found = np.array((left @ right).astype(mx.float32), np.float64)
    except RuntimeError:
        return False
    return bool((np.abs(found - exact) <= 2 * (unit_roundoff + 64 * 2**-24) * exact).all())
