"""The raw facts of a machine: files, sysctl, NVML, memory. The only part of the inventory that touches the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

WATCHED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION",
    "BNB_CUDA_VERSION", "BNB_ROCM_VERSION",
)  # fmt: skip
"""Variables that hide devices or choose libraries; no other is ever read."""

_SYSCTL_NAMES = (
    "machdep.cpu.brand_string", "hw.physicalcpu", "hw.memsize", "hw.optional.arm64", "hw.optional.arm.FEAT_BF16",
    "sysctl.proc_translated", "kern.memorystatus_vm_pressure_level", "vm.swapusage",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlatformFacts:
    """What the Python process knows of its system."""

    system: str
    release: str
    machine: str
    mac_version: str = ""
    logical_cores: int = 1


@dataclass(frozen=True, slots=True)
class NvmlDevice:
    """One device as NVML reports it."""

    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: tuple[int, int] | None
    bus_id: str


@dataclass(frozen=True, slots=True)
class NvmlFacts:
    """NVML's answer; `failure` says why there is none although a driver seems present."""

    driver_version: str = ""
    cuda_version: tuple[int, int] | None = None
    devices: tuple[NvmlDevice, ...] = ()
    failure: str = ""


class MachineFacts(Protocol):
    """Where raw facts come from: this machine, or a recording."""

    def platform(self) -> PlatformFacts: ...

    def read(self, path: str) -> str | None:
        """The text of a file, None when it cannot be read."""
        ...

    def exists(self, path: str) -> bool: ...

    def names(self, folder: str) -> tuple[str, ...]:
        """Sorted names in a folder; empty when there is none."""
        ...

    def sysctl(self) -> Mapping[str, str]: ...

    def nvml(self) -> NvmlFacts | None: ...

    def memory(self) -> tuple[int, int]:
        """Bytes of memory, total and available."""
        ...

    def environment(self) -> Mapping[str, str]: ...


class LiveFacts:
    """This machine, now. NVML is asked once for each object."""

    def __init__(self) -> None:
        self._nvml: NvmlFacts | None = None
        self._nvml_asked = False

    def platform(self) -> PlatformFacts:
        return PlatformFacts(
            platform.system(), platform.release(), platform.machine(), platform.mac_ver()[0], os.cpu_count() or 1
        )

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def names(self, folder: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(folder)))
        except OSError:
            return ()

    def sysctl(self) -> Mapping[str, str]:
        """`sysctl` prints `name: value` lines; names that a machine lacks go to its error stream."""
        try:
            done = subprocess.run(
                ["/usr/sbin/sysctl", *_SYSCTL_NAMES], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return {}
        pairs = (line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
        return {name.strip(): value.strip() for name, value in pairs}

    def nvml(self) -> NvmlFacts | None:
        if not self._nvml_asked:
            self._nvml, self._nvml_asked = _ask_nvml(self), True
        return self._nvml

    def memory(self) -> tuple[int, int]:
        """From the kernel where it tells; importing psutil would cost a third of a probe's time."""
        lines = re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", self.read("/proc/meminfo") or "", re.MULTILINE)
        if len(lines) == 2:
            kilobytes = dict(lines)
            return int(kilobytes["MemTotal"]) * 1024, int(kilobytes["MemAvailable"]) * 1024

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)

    def environment(self) -> Mapping[str, str]:
        return {name: os.environ[name] for name in WATCHED_VARIABLES if name in os.environ}


def _ask_nvml(facts: LiveFacts) -> NvmlFacts | None:
    """Importing the binding costs tens of milliseconds, so machines without any trace of the driver skip it."""
    driver_traces = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
    if platform.system() == "Linux" and not any(facts.exists(path) for path in driver_traces):
        return None
    try:
        import pynvml
    except ImportError:
        return NvmlFacts(failure="nvidia-ml-py is not installed, so memory and compute capability are not known.")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NvmlFacts(failure=f"The NVIDIA driver does not respond: {error}.")
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        devices = tuple(_nvml_device(pynvml, index) for index in range(int(pynvml.nvmlDeviceGetCount())))
        return NvmlFacts(_text(pynvml.nvmlSystemGetDriverVersion()), (version // 1000, version % 1000 // 10), devices)
    except pynvml.NVMLError as error:
        return NvmlFacts(failure=f"The NVIDIA driver does not respond: {error}.")
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(pynvml: Any, index: int) -> NvmlDevice:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return NvmlDevice(
        _text(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        (int(major), int(minor)),
        _text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
