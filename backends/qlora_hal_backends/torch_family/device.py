"""The device under a trainer: which one, what it is called, how much memory it used."""

from __future__ import annotations

import importlib.metadata
import platform as python_platform
import sys
from contextlib import suppress
from importlib.util import find_spec

import torch

from qlora_hal.contract.backend import DeviceFacts
from qlora_hal.errors import BackendUnavailableError
from qlora_hal_backends.torch_family.platform import TorchPlatform

OLDEST_CAPABILITY = (8, 0)
"""NVIDIA compute capability of the oldest devices that Triton 3 is made for (Ampere)."""

_PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "safetensors", "numpy")


def first_device(platform: TorchPlatform) -> torch.device:
    """The first visible device of the platform. Raises BackendUnavailableError: torch never falls back here."""
    if platform.torch_device == "cpu":
        return torch.device("cpu")
    if not torch.get_device_module(platform.torch_device).is_available():
        raise BackendUnavailableError(
            "QH-E04",
            f"torch {torch.__version__} sees no {platform.torch_device} device.",
            cause="The driver or the device is hidden from this process.",
            fix="Run qlora-hal doctor.",
        )
    device = torch.device(platform.torch_device)
    return torch.device(platform.torch_device, 0) if has_queue(device) else device


def has_queue(device: torch.device) -> bool:
    """Whether a device has a memory of its own and a queue that the host runs ahead of: CUDA, ROCm (which answers to
    "cuda"), XPU, and others whose module torch knows. A CPU has neither, and Apple's GPU shares the host's memory."""
    return device.type not in ("cpu", "mps")


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"no Triton kernels on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "the device is older than Triton's kernels"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None


def describe_device(platform: TorchPlatform, device: torch.device, decoding: str) -> DeviceFacts:
    """`decoding` names what unpacks the weights; the products are torch's."""
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    versions["python"] = python_platform.python_version()
    if has_queue(device) and device.type != "cuda":
        properties = torch.get_device_module(device).get_device_properties(device)
        memory = getattr(properties, "total_memory", None)
        return DeviceFacts(properties.name, versions, f"{decoding}, torch {device.type} products", "", memory)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        runtime = torch.version.hip or torch.version.cuda or ""
        return DeviceFacts(
            device=properties.name,
            versions=versions,
            kernel_path=f"{decoding}, {'hipBLAS' if torch.version.hip else 'cuBLAS'} products",
            driver=runtime,
            memory_limit_bytes=properties.total_memory,
        )
    if device.type == "mps":
        return DeviceFacts("Apple GPU (MPS)", versions, f"{decoding}, Metal products")
    return DeviceFacts(_processor_name(), versions, f"{decoding}, torch CPU products")


def free_unused(device: torch.device) -> None:
    """Give back what torch's allocator holds for later."""
    if has_queue(device):
        torch.get_device_module(device).empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """From here on `peak_memory_bytes` counts anew, where the system allows it: macOS and MPS do not."""
    if has_queue(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as counters:
            counters.write("5")  # the peak resident size becomes the present one (proc(5))


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory since load: allocated on a GPU, resident in this process on a CPU."""
    if has_queue(device):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    """The most that this process held. Linux's `ru_maxrss` survives exec: in a child it is no less than what the
    process that started it held."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return python_platform.processor() or python_platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
