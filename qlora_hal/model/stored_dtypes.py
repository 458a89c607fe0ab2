"""How weights are stored: which dtypes are numbers as they stand, and the refusal of what nobody here decodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_hal.errors import ModelError

if TYPE_CHECKING:
    from qlora_hal.model.facts import TensorFacts

FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Safetensors names of the dtypes of weights that are not quantized."""

_UNREAD = re.compile(r"F[468](_.*)?|C\d+")
"""Float8, float6 and float4, which are codes that mean something with their scales only, and complex numbers. MLX hands
the first out as bytes, torch cannot tell whether they are finite, and no library says where the scales lie."""
_SCALES = re.compile(r"\.(weight_scale(_inv)?|input_scale|scale_inv|weight_scale_2)$")


def refuse_unread_dtypes(tensors: Mapping[str, TensorFacts], where: str) -> None:
    """Raises ModelError QH-C72 for tensors in a dtype that no backend decodes, with the first one's name."""
    unread = {name: tensor.dtype for name, tensor in sorted(tensors.items()) if _UNREAD.fullmatch(tensor.dtype)}
    if not unread:
        return
    name, dtype = next(iter(unread.items()))
    others = f" (and {len(unread) - 1} more tensors in the like)" if len(unread) > 1 else ""
    scale = next((other for other in sorted(tensors) if _SCALES.search(other)), "")
    raise ModelError(
        "QH-C72",
        f"{name} is stored as {dtype}{others}, which no backend decodes; readable are F64, F32, F16, BF16 and "
        "the quantized formats of bitsandbytes, GPTQ and MLX.",
        where=where,
        cause=f"Its numbers are those codes times a scale ({scale})." if scale else "",
        fix="Name a version of the model in bfloat16, or convert this one with the tool that wrote it; it is quantized "
        "while loading.",
        context={"tensors": unread},
    )


def not_a_weight(name: str, dtype: str, where: str) -> ModelError:
    """The refusal of integers or truth values where the architecture has floating-point numbers."""
    return ModelError(
        "QH-M50",
        f"{name} is stored as {dtype}; a floating-point number is expected.",
        where=where,
        cause="Nothing beside it says how such codes are decoded.",
        fix="Check that config.json belongs to these weights, or get the model again from its source.",
    )


def packed_elsewhere(module: str, where: str) -> ModelError:
    """The refusal of a quantized head or embedding: only the linear layers inside the model are decoded."""
    return ModelError(
        "QH-C72",
        f"{module} is quantized in this checkpoint; only the linear layers before the output head may be.",
        where=where,
        cause="The loss is computed with an unquantized head, and embeddings are looked up unquantized.",
        fix="Choose a checkpoint whose head and embeddings were left out of quantization, or name the model's "
        "unquantized version: it is quantized while loading.",
    )
