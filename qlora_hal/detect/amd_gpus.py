"""AMD accelerators from the kernel's own files: the compute driver's topology (kfd) and the display driver's memory.

Sources: Linux `drivers/gpu/drm/amd/amdkfd/kfd_topology.c` (the properties files) and the amdgpu sysfs documentation
(`mem_info_vram_total`, `mem_info_vram_used`, `product_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qlora_hal.detect.gpu import Gpu
from qlora_hal.detect.machine_facts import MachineFacts

_NODES = "/sys/class/kfd/kfd/topology/nodes"
_DRM = "/sys/class/drm"

INTEGRATED_TARGETS = frozenset(
    {"gfx902", "gfx909", "gfx90c", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103", "gfx1150", "gfx1151",
     "gfx1152", "gfx1153"}
)  # fmt: skip
"""Graphics inside a processor: their memory is the host's."""


def gfx_name(target_version: int) -> str:
    """`gfx942` from 90402: two decimal digits each of major, minor and stepping; the last two print in base 16."""
    major, minor, stepping = target_version // 10000, target_version // 100 % 100, target_version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def amd_gpus(facts: MachineFacts) -> tuple[Gpu, ...]:
    """Every compute node with SIMD units, in the kernel's order; discrete cards before integrated graphics."""
    driver = (facts.read("/sys/module/amdgpu/version") or "").strip()
    found = []
    for node in sorted(facts.names(_NODES), key=lambda name: (len(name), name)):
        properties = _properties(facts.read(f"{_NODES}/{node}/properties") or "")
        if not properties.get("simd_count") or not properties.get("gfx_target_version"):
            continue
        gfx = gfx_name(properties["gfx_target_version"])
        bus_id = _bus_id(properties)
        card = _card_at(facts, bus_id)
        total = _number(facts, f"{card}/mem_info_vram_total") if card else _bank_bytes(facts, node)
        used = _number(facts, f"{card}/mem_info_vram_used") if card else None
        product = (facts.read(f"{card}/product_name") or "").strip() if card else ""
        found.append(
            Gpu(
                "amd",
                product or f"AMD GPU ({gfx})",
                total,
                total - used if total is not None and used is not None else None,
                gfx=gfx,
                driver_version=driver,
                bus_id=bus_id,
                integrated=gfx in INTEGRATED_TARGETS,
            )
        )
    return tuple(sorted(found, key=lambda gpu: gpu.integrated))


def _properties(text: str) -> dict[str, int]:
    """`name value` lines."""
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


def _bus_id(properties: Mapping[str, int]) -> str:
    """`location_id` holds bus, device and function as the PCI standard packs them."""
    location = properties.get("location_id", 0)
    bus, device, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 0x7
    return f"{properties.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _card_at(facts: MachineFacts, bus_id: str) -> str:
    for name in facts.names(_DRM):
        if re.fullmatch(r"card\d+", name):
            event = facts.read(f"{_DRM}/{name}/device/uevent") or ""
            if f"PCI_SLOT_NAME={bus_id}" in event:
                return f"{_DRM}/{name}/device"
    return ""


def _bank_bytes(facts: MachineFacts, node: str) -> int | None:
    """Device-local memory banks of the node: heap types 1 (public) and 2 (private)."""
    folder = f"{_NODES}/{node}/mem_banks"
    banks = [_properties(facts.read(f"{folder}/{bank}/properties") or "") for bank in facts.names(folder)]
    return sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2)) or None


def _number(facts: MachineFacts, path: str) -> int | None:
    text = (facts.read(path) or "").strip()
    return int(text) if text.isdigit() else None
