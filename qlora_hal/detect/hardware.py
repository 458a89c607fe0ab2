"""What this machine is, told without any tensor library: system, processor, memory, accelerators and their drivers.

Everything raw is read through one `MachineFacts`, so that a recorded set of facts can be replayed in its place.
`inventory` only interprets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from qlora_hal.detect.amd_gpus import amd_gpus
from qlora_hal.detect.gpu import Gpu, Vendor
from qlora_hal.detect.mac_memory import pressure
from qlora_hal.detect.machine_facts import LiveFacts, MachineFacts

_PCI_VENDORS: Mapping[str, Vendor] = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_PCI_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D and other display controllers, and processing accelerators (where Instinct cards appear)."""

_INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "avx_vnni", "fma", "f16c",
    "asimd", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_NO_CGROUP_LIMIT = 2**60
"""Version 1 control groups say `no limit` by a number near 2**63."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor; `instruction_sets` lists those that matter for numerics, in Linux's names."""

    name: str
    logical_cores: int
    physical_cores: int | None = None
    instruction_sets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine at one moment.

    `architecture` is the hardware's (`arm64` also under Rosetta). `unusable_cards` names vendors whose card is on the
    bus although no driver answers. `memory_limit_bytes` is the container's. `environment` holds the variables that
    hide devices or choose libraries. `cuda_version` is the highest that the NVIDIA driver runs. `memory_pressure` is
    what a Mac says of it, "" where it is normal.
    """

    system: str
    system_version: str
    architecture: str
    is_rosetta: bool
    is_wsl: bool
    cpu: Cpu
    memory_bytes: int
    memory_available_bytes: int | None = None
    memory_limit_bytes: int | None = None
    memory_pressure: str = ""
    gpus: tuple[Gpu, ...] = ()
    unusable_cards: tuple[Vendor, ...] = ()
    nvidia_driver: str = ""
    cuda_version: tuple[int, int] | None = None
    has_kfd: bool = False
    rocm_version: str = ""
    apple_chip: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def gpus_of(self, vendor: Vendor) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.vendor == vendor)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def inventory(facts: MachineFacts | None = None) -> Machine:
    """Describe the machine; by default this one. Never raises for a fact that is missing."""
    facts = facts or LiveFacts()
    platform = facts.platform()
    system = platform.system
    sysctl = facts.sysctl() if system == "Darwin" else {}
    total, available = facts.memory()
    nvml = facts.nvml() if system != "Darwin" else None
    gpus = (*_nvidia_gpus(facts), *amd_gpus(facts), *_apple_gpus(platform.machine, sysctl, total))
    seen = {gpu.vendor for gpu in gpus}
    return Machine(
        system=system,
        system_version=platform.mac_version if system == "Darwin" else platform.release,
        architecture=_architecture(platform.machine, sysctl),
        is_rosetta=sysctl.get("sysctl.proc_translated") == "1",
        is_wsl="microsoft" in (facts.read("/proc/version") or "").lower(),
        cpu=_cpu(facts, sysctl, platform.logical_cores),
        memory_bytes=total,
        memory_available_bytes=available,
        memory_limit_bytes=_container_limit(facts, total),
        memory_pressure=pressure(sysctl),
        gpus=gpus,
        unusable_cards=tuple(vendor for vendor in _cards_on_the_bus(facts) if vendor not in seen),
        nvidia_driver=_nvidia_driver(facts),
        cuda_version=nvml.cuda_version if nvml else None,
        has_kfd=facts.exists("/dev/kfd"),
        rocm_version=(facts.read("/opt/rocm/.info/version") or "").strip(),
        apple_chip=sysctl.get("machdep.cpu.brand_string", "") if system == "Darwin" else "",
        environment=facts.environment(),
        notes=(nvml.failure,) if nvml and nvml.failure else (),
    )


# NVIDIA -------------------------------------------------------------------------------------------------------------
def memory_here(machine: Machine | None = None) -> int:
    """Bytes of memory that a process of this machine can have: the machine's, or the container's."""
    machine = machine or inventory()
    return min(machine.memory_bytes, machine.memory_limit_bytes or machine.memory_bytes)


def memory_available_here(facts: MachineFacts | None = None) -> int:
    """Bytes of memory that nothing on this machine takes now, and no more than its container has left."""
    facts = facts or LiveFacts()
    _, available = facts.memory()
    return max(0, min([available, *_left_in_groups(facts)]))


def _nvidia_gpus(facts: MachineFacts) -> tuple[Gpu, ...]:
    """From NVML; where that does not answer, from the driver's own files, without memory or compute capability."""
    nvml = facts.nvml()
    if nvml is not None and nvml.devices:
        return tuple(
            Gpu(
                "nvidia",
                device.name,
                device.memory_total_bytes,
                device.memory_free_bytes,
                compute_capability=device.compute_capability,
                driver_version=nvml.driver_version,
                bus_id=device.bus_id,
            )
            for device in nvml.devices
        )
    found = []
    for bus_id in facts.names("/proc/driver/nvidia/gpus"):
        text = facts.read(f"/proc/driver/nvidia/gpus/{bus_id}/information") or ""
        name = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        found.append(
            Gpu(
                "nvidia", name[1].strip() if name else "NVIDIA GPU", driver_version=_nvidia_driver(facts), bus_id=bus_id
            )
        )
    return tuple(found)


def _nvidia_driver(facts: MachineFacts) -> str:
    nvml = facts.nvml()
    if nvml is not None and nvml.driver_version:
        return nvml.driver_version
    text = facts.read("/proc/driver/nvidia/version") or ""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else ""


# Apple --------------------------------------------------------------------------------------------------------------
def _apple_gpus(machine: str, sysctl: Mapping[str, str], memory_bytes: int) -> tuple[Gpu, ...]:
    if sysctl and _architecture(machine, sysctl) == "arm64":
        chip = sysctl.get("machdep.cpu.brand_string", "Apple GPU")
        return (Gpu("apple", chip, memory_bytes, integrated=True),)
    return ()


def _architecture(machine: str, sysctl: Mapping[str, str]) -> str:
    """The hardware's architecture: under Rosetta the process reports x86_64 on arm64 hardware."""
    is_apple_silicon = sysctl.get("hw.optional.arm64") == "1" or sysctl.get("sysctl.proc_translated") == "1"
    return "arm64" if is_apple_silicon else machine


# everything else ----------------------------------------------------------------------------------------------------
def _cards_on_the_bus(facts: MachineFacts) -> tuple[Vendor, ...]:
    vendors = []
    for address in facts.names("/sys/bus/pci/devices"):
        kind = (facts.read(f"/sys/bus/pci/devices/{address}/class") or "").strip()
        if kind.startswith(_PCI_DISPLAY_CLASSES):
            vendor = (facts.read(f"/sys/bus/pci/devices/{address}/vendor") or "").strip()
            vendors.append(_PCI_VENDORS.get(vendor))
    return tuple(dict.fromkeys(vendor for vendor in vendors if vendor))


def _cpu(facts: MachineFacts, sysctl: Mapping[str, str], logical_cores: int) -> Cpu:
    if sysctl:
        bf16 = ("bf16",) if sysctl.get("hw.optional.arm.FEAT_BF16") == "1" else ()
        physical = sysctl.get("hw.physicalcpu", "")
        return Cpu(
            sysctl.get("machdep.cpu.brand_string", ""),
            logical_cores,
            int(physical) if physical.isdigit() else None,
            bf16,
        )
    text = facts.read("/proc/cpuinfo") or ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    cores = {
        (socket, core)
        for socket, core in re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", text, re.M | re.S)
    }
    return Cpu(
        name[1].strip() if name else "",
        logical_cores,
        len(cores) or None,
        tuple(flag for flag in _INSTRUCTION_SETS if flag in present),
    )


def _container_limit(facts: MachineFacts, total: int) -> int | None:
    """The tightest memory limit of this process's control groups and of those around them, version 2 or 1; None when
    it is no limit."""
    limits = [limit for _, limit, _ in _limited_groups(facts)]
    return min(limits) if limits and min(limits) < total else None


def _left_in_groups(facts: MachineFacts) -> Iterator[int]:
    """What each group that has a limit may still take. Pages of files that nobody used lately make way."""
    for version, limit, group in _limited_groups(facts):
        used = (facts.read(f"{group}/{version.usage}") or "").strip()
        unused = re.search(rf"^{version.inactive} (\d+)$", facts.read(f"{group}/memory.stat") or "", re.MULTILINE)
        yield limit - (int(used) if used.isdigit() else 0) + (int(unused[1]) if unused else 0)


class _GroupFiles(NamedTuple):
    """Of one version of control groups: how /proc/self/cgroup names the own one, and the files of each."""

    own: str
    root: str
    limit: str
    usage: str
    inactive: str


_GROUP_FILES = (
    _GroupFiles(r"^0::(/.*)$", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _GroupFiles(
        r"^\d+:[^:]*\bmemory\b[^:]*:(/.*)$",
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _limited_groups(facts: MachineFacts) -> Iterator[tuple[_GroupFiles, int, str]]:
    """(version, limit, folder) of every control group from the root to this process's own that has a limit."""
    groups = facts.read("/proc/self/cgroup") or ""
    for version in _GROUP_FILES:
        own = re.search(version.own, groups, re.MULTILINE)
        names = [name for name in own[1].split("/") if name] if own else []
        for depth in range(len(names) + 1):
            folder = "/".join([version.root, *names[:depth]])
            value = (facts.read(f"{folder}/{version.limit}") or "").strip()
            if value.isdigit() and int(value) < _NO_CGROUP_LIMIT:
                yield version, int(value), folder
