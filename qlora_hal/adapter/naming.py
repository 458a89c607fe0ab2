"""Names of adapter tensors: PEFT's, on every backend.

PEFT wraps a model twice (`base_model.model.`), so its files carry that prefix before the module's own path.
"""

from __future__ import annotations

from typing import Literal

PREFIX = "base_model.model."
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"


def lora_a_key(module: str) -> str:
    """Name of the tensor A `[r, in]` of a module."""
    return f"{PREFIX}{module}{A_SUFFIX}"


def lora_b_key(module: str) -> str:
    """Name of the tensor B `[out, r]` of a module."""
    return f"{PREFIX}{module}{B_SUFFIX}"


def module_of(key: str) -> tuple[str, Literal["A", "B"]]:
    """The module and the half that a tensor name stands for. Raises ValueError for any other name."""
    if key.startswith(PREFIX):
        path = key.removeprefix(PREFIX)
        if path.endswith(A_SUFFIX) and len(path) > len(A_SUFFIX):
            return path.removesuffix(A_SUFFIX), "A"
        if path.endswith(B_SUFFIX) and len(path) > len(B_SUFFIX):
            return path.removesuffix(B_SUFFIX), "B"
    raise ValueError(f"{key!r} is not a LoRA tensor name; {PREFIX}<module>{A_SUFFIX} or {B_SUFFIX} is expected")
