"""The modules that the reference backend computes with, by short names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

BACKEND = "qlora_hal_conformance.reference_backend"
ORACLE = "qlora_hal_oracle"
DROPOUT = "qlora_hal.contract.dropout"
COPIED = (BACKEND, ORACLE, DROPOUT)
"""What a private copy has of its own. The rest of the core is shared: it is no part of a backend."""

MODULES: Mapping[str, str] = {
    "backend_dropout": f"{BACKEND}.dropout",
    "loading": f"{BACKEND}.loading",
    "refusals": f"{BACKEND}.refusals",
    "rooms": f"{BACKEND}.rooms",
    "rounding": f"{BACKEND}.rounding",
    "step": f"{BACKEND}.step",
    "storage": f"{BACKEND}.storage",
    "trainer": f"{BACKEND}.trainer",
    "adamw": f"{ORACLE}.adamw",
    "blocks": f"{ORACLE}.blocks",
    "codebooks": f"{ORACLE}.codebooks",
    "double_quantization": f"{ORACLE}.double_quantization",
    "four_bit": f"{ORACLE}.four_bit",
    "int8": f"{ORACLE}.int8",
    "llama": f"{ORACLE}.llama",
    "lora": f"{ORACLE}.lora",
    "loss": f"{ORACLE}.loss",
    "roundoff": f"{ORACLE}.roundoff",
    "shape": f"{ORACLE}.shape",
    "dropout": DROPOUT,
}
"""Those that are changed. Declarations are not: a backend that declares less is another honest one."""


def file_of(module: str) -> Path:
    """Where a module that can be imported lies."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin)


@cache
def source_of(short: str) -> str:
    """The text of one of `MODULES`."""
    return file_of(MODULES[short]).read_text(encoding="utf-8")
