"""Which floats the matrix units of a GPU multiply, by its architecture: one rule for cards that are planned for, that
are here, and that a backend has opened.

Sources: NVIDIA, PTX ISA, `mma` (`.bf16` from sm_80 on, `.e4m3` from sm_89 on); AMD, instruction set reference guides
(bfloat16 matrix instructions from CDNA on, WMMA from RDNA 3 on).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from qlora_hal.errors import ConfigError, QloraHalError, UnsupportedFeatureError

Capability = tuple[int, int]


class Architecture(Protocol):
    """What tells one generation of GPUs from another; None and "" where it is not known, or another vendor's word."""

    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> Capability | None: ...
    @property
    def gfx(self) -> str: ...


class _CameWith(NamedTuple):
    """The floats by their name in hardware, and the first compute capability that has them."""

    floats: str
    capability: Capability
    generation: str


NVIDIA: Mapping[str, _CameWith] = {
    "bfloat16": _CameWith("bfloat16", (8, 0), "Ampere"),
    "fp8": _CameWith("E4M3", (8, 9), "Ada, Hopper"),
}
"""By `quantization.compute_dtype`."""
AMD_BFLOAT16 = re.compile(r"gfx(908|90a|94\w|950|11\w\w|12\w\w)")
"""Targets of CDNA 1 and RDNA 3 and of what came after. Products in fp8 are the backend's to have (`fp8_products`)."""


def lacking_dtype(asked: str, compute_capability: Capability | None, gfx: str = "") -> str:
    """Why a GPU does not compute in a `quantization.compute_dtype`, to complete `it is of`; "" where it does, or where
    its age is not known."""
    if compute_capability is not None and (came := NVIDIA.get(asked)) and compute_capability < came.capability:
        found, needed = (".".join(map(str, one)) for one in (compute_capability, came.capability))
        return f"compute capability {found}, and {came.floats} came with {needed} ({came.generation})"
    if asked == "bfloat16" and gfx and not AMD_BFLOAT16.fullmatch(gfx):
        return f"{gfx}, and bfloat16 came with CDNA and RDNA 3"
    return ""


def lacking_dtype_of(asked: str, gpu: Architecture | None) -> str:
    """The same of a GPU; "" without one."""
    return "" if gpu is None else lacking_dtype(asked, gpu.compute_capability, gpu.gfx)


def dtype_refused(asked: str, reason: str) -> QloraHalError:
    """UnsupportedFeatureError QH-B01 for products in fp8, which are a feature, else ConfigError QH-N10."""
    where = "quantization.compute_dtype"
    if asked == "fp8":
        return UnsupportedFeatureError(
            "QH-B01",
            f"Products with the base in 8-bit floats are not possible: {reason}.",
            where=where,
            fix="Set quantization.compute_dtype: bfloat16, or auto.",
        )
    return ConfigError(
        "QH-N10",
        f"quantization.compute_dtype is {asked}, which this device does not compute in: {reason}.",
        where=where,
        fix="Set it to float16 (with loss scaling), or to auto.",
    )
