"""Well-known accelerators, for `estimate` on a machine that has none of them: memory, dtype, and whose word it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.contract.values import ComputeDtype

MIB = 2**20
GIB = 2**30

DEVICE_KINDS: Mapping[str, str] = {"nvidia": "cuda", "amd": "rocm", "apple": "mps"}


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """One accelerator, with the memory that its driver reports for one device of it. `compute_dtype` is the 16-bit
    dtype that its matrix units have; `source` is the vendor's document of both. `devices` are on one card. `has_fp8`:
    whether products in 8-bit floats are computed on it (`Feature.FP8_PRODUCTS`)."""

    name: str
    vendor: str
    memory_bytes: int
    compute_dtype: ComputeDtype = "bfloat16"
    source: str = ""
    devices: int = 1
    has_fp8: bool = False

    @property
    def device_kind(self) -> str:
        return DEVICE_KINDS[self.vendor]


def apple_working_set(unified_bytes: int) -> int:
    """Bytes that Metal recommends as the most for one process: two thirds of the memory up to 32 GiB, else 3/4.

    An approximation of `recommendedMaxWorkingSetSize`, which only the device itself tells; the lower reported share.
    """
    return unified_bytes * 2 // 3 if unified_bytes <= 32 * GIB else unified_bytes * 3 // 4


def _nvidia(
    name: str, mib: int, source: str, compute_dtype: ComputeDtype = "bfloat16", *, fp8: bool = False
) -> KnownGpu:
    return KnownGpu(f"NVIDIA {name}", "nvidia", mib * MIB, compute_dtype, f"NVIDIA, {source}", has_fp8=fp8)


def _amd(name: str, gib: int, source: str, devices: int = 1) -> KnownGpu:
    return KnownGpu(f"AMD {name}", "amd", gib * GIB, "bfloat16", f"AMD, {source}", devices)


def _mac(gib: int) -> KnownGpu:
    source = "Apple, Metal: recommendedMaxWorkingSetSize"
    return KnownGpu(f"Apple M-series, {gib} GB", "apple", apple_working_set(gib * GIB), "bfloat16", source)


def _geforce(source: str, memories: Mapping[str, int], *, fp8: bool = True) -> tuple[KnownGpu, ...]:
    """Cards of a generation, by name, with their MiB. 8-bit floats came with Ada."""
    return tuple(_nvidia(name, mib, source, fp8=fp8) for name, mib in memories.items())


_TURING, _VOLTA = "Turing architecture white paper", "Tesla V100 architecture white paper"
_GA102, _ADA = "Ampere GA102 architecture white paper", "Ada GPU architecture white paper"
_BLACKWELL = "RTX Blackwell GPU architecture white paper"
_LAPTOPS = "nvidia.com/geforce/gaming-laptops/compare"

KNOWN_GPUS: tuple[KnownGpu, ...] = (
    _nvidia("T4", 15360, f"T4 data sheet; {_TURING}", "float16"),
    _nvidia("V100 16 GB", 16384, f"V100 data sheet; {_VOLTA}", "float16"),
    _nvidia("V100 32 GB", 32768, f"V100 data sheet; {_VOLTA}", "float16"),
    _nvidia("L4", 23034, "L4 data sheet", fp8=True),
    _nvidia("A10G", 23028, "A10 data sheet"),
    _nvidia("RTX A6000", 49140, f"RTX A6000 data sheet; {_GA102}"),
    _nvidia("L40", 46068, "L40 data sheet", fp8=True),
    _nvidia("L40S", 46068, "L40S data sheet", fp8=True),
    *_geforce(
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
        fp8=False,
    ),
    *_geforce(
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
        fp8=False,
    ),
    *_geforce(
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
    _nvidia("A100 40 GB", 40960, "A100 data sheet"),
    _nvidia("A100 80 GB", 81920, "A100 data sheet"),
    _nvidia("H100 80 GB", 81559, "H100 data sheet", fp8=True),
    _nvidia("H200", 143771, "H200 data sheet", fp8=True),
    _nvidia("B200", 183359, "DGX B200 data sheet", fp8=True),
    _amd("Instinct MI100", 32, "Instinct MI100 data sheet"),
    _amd("Instinct MI210", 64, "Instinct MI210 data sheet"),
    _amd("Instinct MI250X", 64, "Instinct MI250X data sheet: two dies of 64 GB, each a device", devices=2),
    _amd("Instinct MI300X", 192, "Instinct MI300X data sheet"),
    _amd("Radeon RX 7900 GRE", 16, "Radeon RX 7900 GRE specifications"),
    _amd("Radeon RX 7900 XT", 20, "Radeon RX 7900 XT specifications"),
    _amd("Radeon RX 7900 XTX", 24, "Radeon RX 7900 XTX specifications"),
    _amd("Radeon RX 9060 XT 8 GB", 8, "Radeon RX 9060 XT specifications"),
    _amd("Radeon RX 9060 XT 16 GB", 16, "Radeon RX 9060 XT specifications"),
    _amd("Radeon RX 9070", 16, "Radeon RX 9070 specifications"),
    _amd("Radeon RX 9070 XT", 16, "Radeon RX 9070 XT specifications"),
    _amd("Radeon AI PRO R9700", 32, "Radeon AI PRO R9700 specifications"),
    *(_mac(gib) for gib in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)),
)
"""Totals as `nvidia-smi` and amdgpu report them, which is the data sheet's memory less what the driver keeps; Apple:
the working set, of unified memory. A card of one name that was sold with two memories has a row for each; of a
laptop's GPU the name tells the memory, which often differs from the card's. bfloat16 came with NVIDIA's Ampere and
AMD's CDNA; Turing and Volta have float16 alone."""


def cards_for(*, fp8_products: bool) -> tuple[KnownGpu, ...]:
    """The known cards that can serve a run, by what its products are computed in."""
    return tuple(card for card in KNOWN_GPUS if card.has_fp8 or not fp8_products)


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
