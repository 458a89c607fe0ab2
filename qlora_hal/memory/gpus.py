"""Well-known accelerators, for `estimate` where none of them is: memory, architecture, and whose word that is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.detect.gpu_dtypes import lacking_dtype_of
from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.contract.values import ComputeDtype

MIB = 2**20
GIB = 2**30

DEVICE_KINDS: Mapping[str, str] = {"nvidia": "cuda", "amd": "rocm", "apple": "mps"}


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """One accelerator, with the memory that its driver reports for one device of it, and its `source`. Its generation
    is NVIDIA's `compute_capability`, AMD's target name `gfx`, or Apple's `metal_family`. `devices` are on one card."""

    name: str
    vendor: str
    memory_bytes: int
    source: str
    compute_capability: tuple[int, int] | None = None
    gfx: str = ""
    metal_family: int | None = None
    devices: int = 1

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The 16-bit dtype that its matrix units have."""
        return "float16" if lacking_dtype_of("bfloat16", self) else "bfloat16"

    @property
    def architecture(self) -> str:
        """As the vendor writes it."""
        if self.compute_capability is not None:
            return "compute capability " + ".".join(map(str, self.compute_capability))
        return self.gfx or f"Apple{self.metal_family}"

    @property
    def device_kind(self) -> str:
        return DEVICE_KINDS[self.vendor]


def apple_working_set(unified_bytes: int) -> int:
    """Bytes that Metal recommends as the most for one process: two thirds of the memory up to 32 GiB, else 3/4.

    An approximation of `recommendedMaxWorkingSetSize`, which only the device itself tells; the lower reported share.
    """
    return unified_bytes * 2 // 3 if unified_bytes <= 32 * GIB else unified_bytes * 3 // 4


def _nvidia(name: str, mib: int, capability: tuple[int, int], source: str) -> KnownGpu:
    return KnownGpu(f"NVIDIA {name}", "nvidia", mib * MIB, f"NVIDIA, {source}", compute_capability=capability)


def _amd(name: str, gib: int, gfx: str, source: str, devices: int = 1) -> KnownGpu:
    return KnownGpu(f"AMD {name}", "amd", gib * GIB, f"AMD, {source}", gfx=gfx, devices=devices)


def _mac(gib: int) -> KnownGpu:
    source = "Apple, Metal: recommendedMaxWorkingSetSize"
    return KnownGpu(f"Apple M-series, {gib} GB", "apple", apple_working_set(gib * GIB), source, metal_family=FIRST_M)


def _geforce(capability: tuple[int, int], source: str, memories: Mapping[str, int]) -> tuple[KnownGpu, ...]:
    """Cards of a generation, by name, with their MiB."""
    return tuple(_nvidia(name, mib, capability, source) for name, mib in memories.items())


# NVIDIA, developer.nvidia.com/cuda-gpus: the compute capability of each card.
VOLTA, TURING, AMPERE, RTX_AMPERE, ADA = (7, 0), (7, 5), (8, 0), (8, 6), (8, 9)
HOPPER, BLACKWELL, RTX_BLACKWELL = (9, 0), (10, 0), (12, 0)
FIRST_M = 7
"""The Metal family of the M1; later ones have more. Source: Apple, Metal feature set tables."""
_TURING, _VOLTA = "Turing architecture white paper", "Tesla V100 architecture white paper"
_GA102, _ADA = "Ampere GA102 architecture white paper", "Ada GPU architecture white paper"
_BLACKWELL = "RTX Blackwell GPU architecture white paper"
_LAPTOPS = "nvidia.com/geforce/gaming-laptops/compare"

KNOWN_GPUS: tuple[KnownGpu, ...] = (
    _nvidia("T4", 15360, TURING, f"T4 data sheet; {_TURING}"),
    _nvidia("V100 16 GB", 16384, VOLTA, f"V100 data sheet; {_VOLTA}"),
    _nvidia("V100 32 GB", 32768, VOLTA, f"V100 data sheet; {_VOLTA}"),
    _nvidia("L4", 23034, ADA, "L4 data sheet"),
    _nvidia("A10G", 23028, RTX_AMPERE, "A10 data sheet"),
    _nvidia("RTX A6000", 49140, RTX_AMPERE, f"RTX A6000 data sheet; {_GA102}"),
    _nvidia("L40", 46068, ADA, "L40 data sheet"),
    _nvidia("L40S", 46068, ADA, "L40S data sheet"),
    *_geforce(
        RTX_AMPERE,
        _GA102,
        {
            "RTX 3050 6 GB": 6144,
            "RTX 3050 8 GB": 8192,
            "RTX 3060 8 GB": 8192,
            "RTX 3060 12 GB": 12288,
            "RTX 3060 Ti": 8192,
            "RTX 3070": 8192,
            "RTX 3070 Ti": 8192,
            "RTX 3080 10 GB": 10240,
            "RTX 3080 12 GB": 12288,
            "RTX 3080 Ti": 12288,
            "RTX 3090": 24576,
            "RTX 3090 Ti": 24564,
        },
    ),
    *_geforce(
        RTX_AMPERE,
        _LAPTOPS,
        {
            "RTX 3050 Laptop 4 GB": 4096,
            "RTX 3050 Laptop 6 GB": 6144,
            "RTX 3050 Ti Laptop": 4096,
            "RTX 3060 Laptop": 6144,
            "RTX 3070 Laptop": 8192,
            "RTX 3070 Ti Laptop": 8192,
            "RTX 3080 Laptop 8 GB": 8192,
            "RTX 3080 Laptop 16 GB": 16384,
            "RTX 3080 Ti Laptop": 16384,
        },
    ),
    *_geforce(
        ADA,
        _ADA,
        {
            "RTX 4060": 8188,
            "RTX 4060 Ti 8 GB": 8188,
            "RTX 4060 Ti 16 GB": 16380,
            "RTX 4070": 12282,
            "RTX 4070 SUPER": 12282,
            "RTX 4070 Ti": 12282,
            "RTX 4070 Ti SUPER": 16376,
            "RTX 4080": 16376,
            "RTX 4080 SUPER": 16376,
            "RTX 4090": 24564,
        },
    ),
    *_geforce(
        ADA,
        _LAPTOPS,
        {
            "RTX 4050 Laptop": 6141,
            "RTX 4060 Laptop": 8188,
            "RTX 4070 Laptop": 8188,
            "RTX 4080 Laptop": 12282,
            "RTX 4090 Laptop": 16376,
        },
    ),
    *_geforce(
        RTX_BLACKWELL,
        _BLACKWELL,
        {
            "RTX 5050": 8151,
            "RTX 5060": 8151,
            "RTX 5060 Ti 8 GB": 8151,
            "RTX 5060 Ti 16 GB": 16311,
            "RTX 5070": 12227,
            "RTX 5070 Ti": 16303,
            "RTX 5080": 16303,
            "RTX 5090": 32607,
        },
    ),
    *_geforce(
        RTX_BLACKWELL,
        _LAPTOPS,
        {
            "RTX 5050 Laptop": 8151,
            "RTX 5060 Laptop": 8151,
            "RTX 5070 Laptop": 8151,
            "RTX 5070 Ti Laptop": 12227,
            "RTX 5080 Laptop": 16303,
            "RTX 5090 Laptop": 24463,
        },
    ),
    _nvidia("A100 40 GB", 40960, AMPERE, "A100 data sheet"),
    _nvidia("A100 80 GB", 81920, AMPERE, "A100 data sheet"),
    _nvidia("H100 80 GB", 81559, HOPPER, "H100 data sheet"),
    _nvidia("H200", 143771, HOPPER, "H200 data sheet"),
    _nvidia("B200", 183359, BLACKWELL, "DGX B200 data sheet"),
    _amd("Instinct MI100", 32, "gfx908", "Instinct MI100 data sheet"),
    _amd("Instinct MI210", 64, "gfx90a", "Instinct MI210 data sheet"),
    _amd("Instinct MI250X", 64, "gfx90a", "Instinct MI250X data sheet: two dies of 64 GB, each a device", devices=2),
    _amd("Instinct MI300X", 192, "gfx942", "Instinct MI300X data sheet"),
    _amd("Radeon RX 7900 GRE", 16, "gfx1100", "Radeon RX 7900 GRE specifications"),
    _amd("Radeon RX 7900 XT", 20, "gfx1100", "Radeon RX 7900 XT specifications"),
    _amd("Radeon RX 7900 XTX", 24, "gfx1100", "Radeon RX 7900 XTX specifications"),
    _amd("Radeon RX 9060 XT 8 GB", 8, "gfx1200", "Radeon RX 9060 XT specifications"),
    _amd("Radeon RX 9060 XT 16 GB", 16, "gfx1200", "Radeon RX 9060 XT specifications"),
    _amd("Radeon RX 9070", 16, "gfx1201", "Radeon RX 9070 specifications"),
    _amd("Radeon RX 9070 XT", 16, "gfx1201", "Radeon RX 9070 XT specifications"),
    _amd("Radeon AI PRO R9700", 32, "gfx1201", "Radeon AI PRO R9700 specifications"),
    *(_mac(gib) for gib in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)),
)
"""Totals as `nvidia-smi` and amdgpu report them, which is the data sheet's memory less what the driver keeps; Apple:
the working set, of unified memory. A card of one name that was sold with two memories has a row for each; of a
laptop's GPU the name tells the memory, which often differs from the card's. AMD's targets are those of the ROCm
documentation (GPU hardware specifications)."""


def known_gpu(name: str) -> KnownGpu:
    """The card of that name: all of its words are in the name, and all that tell the model apart are asked for, as
    `4090`, `rtx-4090`, `A100 80GB`; of several the one whose name, with its memory or without, ends with them. Raises
    ConfigError QH-U80 with the closest names."""
    asked = _words(name)
    found = [card for card in KNOWN_GPUS if _model_words(card) <= set(asked) <= set(_words(card.name))]
    if len(found) > 1:
        exact = [card for card in found if asked in (_words(card.name)[-len(asked) :], _model(card)[-len(asked) :])]
        found = exact or found
    if len(found) == 1:
        return found[0]
    names = [card.name for card in found] or _closest(asked)
    raise ConfigError(
        "QH-U80",
        f"--gpu {name!r} {'may be several cards' if found else 'is no card that is known here'}.",
        where="command line --gpu",
        cause=f"Close names: {', '.join(names)}." if names else "",
        fix="Name one of them, or the memory of one device: --training.memory_limit 24GB"
        if names
        else "Name the memory of one device instead: --training.memory_limit 24GB",
        context={"close": names},
    )


_GLUED = re.compile(r"(?<=\d)(?=gi?b\b)|(?<=[a-z])(?=\d{4})|(?<=\d{4})(?=[a-z])")
"""Where names are written together: `80GB`, `rtx4090`, `4090ti`."""


_OF_NO_MODEL = re.compile(r"geforce|gpu|tesla|sxm\d*|pcie|hbm\d*e?")
"""Words of some names, `nvidia-smi`'s among them, that tell no card from another."""
_SYNONYMS: Mapping[str, str] = {"gib": "gb", "notebook": "laptop", "mobile": "laptop"}
_BRANDS = frozenset({"nvidia", "amd", "apple", "rtx", "rx", "radeon", "instinct"})


def _words(name: str) -> tuple[str, ...]:
    spaced = _GLUED.sub(" ", re.sub(r"[^a-z0-9]+", " ", name.lower()))
    for written, meant in _SYNONYMS.items():
        spaced = spaced.replace(written, meant)
    return tuple(word for word in spaced.split() if not _OF_NO_MODEL.fullmatch(word))


def _model(card: KnownGpu) -> tuple[str, ...]:
    """The name's words without the memory at its end."""
    words = _words(card.name)
    return words[:-2] if words[-1] == "gb" else words


def _model_words(card: KnownGpu) -> frozenset[str]:
    """What tells the model apart: of an Apple chip it is the memory."""
    if card.vendor == "apple":
        return frozenset({"apple"})
    return frozenset(_model(card)) - _BRANDS


def _closest(asked: tuple[str, ...]) -> list[str]:
    """Up to four names, the closest first: by the word that is closest in each."""
    short = {card.name: " ".join(_words(card.name)[1:]) for card in KNOWN_GPUS}
    scores = {
        name: max(
            difflib.SequenceMatcher(None, " ".join(asked), words).ratio(),
            max((difflib.SequenceMatcher(None, " ".join(asked), word).ratio() for word in words.split()), default=0.0),
        )
        for name, words in short.items()
    }
    ranked = sorted(scores, key=lambda name: -scores[name])
    return [name for name in ranked[:4] if scores[name] >= 0.5]
