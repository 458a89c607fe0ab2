"""GPTQ: integers of 4 or 8 bits with a scale and a zero point to a group (Frantar et al. 2022).

A module has `qweight` int32 [in * bits / 32, out], `scales` [groups, out], `qzeros` and `g_idx` [in] (auto-gptq 0.7.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.record import (
    CheckpointLayout,
    FormatRecord,
    Packing,
    StoredCheckpoint,
    UnreadableFormatError,
)
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.codecs import GptqCodec

BITS = (4, 8)
BLOCK_SIZES = (128, 64, 32, 16, 256, 512, 1024)
_SETTINGS = ("bits", "group_size", "sym", "desc_act", "true_sequential")


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return _has_qweights(checkpoint) or _is_marlins(checkpoint)


def _has_qweights(checkpoint: StoredCheckpoint) -> bool:
    packed = any(name.endswith(".qweight") for name in checkpoint.tensors)
    return packed and checkpoint.quant_method in {"", "gptq"}


def _is_marlins(checkpoint: StoredCheckpoint) -> bool:
    return any(name.endswith(".B") and f"{name[:-1]}s" in checkpoint.tensors for name in checkpoint.tensors)


def _read(checkpoint: StoredCheckpoint) -> Packing:
    if not _has_qweights(checkpoint):
        raise _only_for_marlin()
    described = _description(checkpoint)
    bits = checkpoint.whole("bits", described.get("bits"))
    if bits not in BITS:
        raise UnreadableFormatError(f"quantized with GPTQ in {bits} bits")
    convention = _convention(described)
    group_size = described.get("group_size", -1)
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".qweight"):
        absent = [part for part in ("qzeros", "scales", "g_idx") if f"{module}.{part}" not in checkpoint.tensors]
        if absent:
            raise checkpoint.contradiction(f"{module} has a qweight but no {', '.join(absent)}")
        rows, columns = checkpoint.matrix(f"{module}.qweight")
        inputs = rows * 32 // bits
        groups = checkpoint.shape(f"{module}.scales")[0]
        g_idx = checkpoint.tensors.get(f"{module}.g_idx")
        if g_idx is not None and g_idx.shape != (inputs,):
            raise checkpoint.contradiction(
                f"{module}.g_idx has shape {list(g_idx.shape)}, {bits} bits give {inputs} inputs"
            )
        if isinstance(group_size, int) and group_size > 0 and groups != -(-inputs // group_size):
            raise checkpoint.contradiction(
                f"{module} has {groups} groups, group_size {group_size} gives another number"
            )
        shapes[module] = LinearShape(inputs, columns)
    block_size = group_size if isinstance(group_size, int) and group_size > 0 else None
    settings = {key: described[key] for key in _SETTINGS if key in described}
    settings["checkpoint_format"] = convention
    if writer := _written_by(described):
        settings["quantizer"] = writer
    return Packing(Prequantized("gptq", f"int{bits}_gptq", block_size, False, settings), shapes)


def _convention(described: Mapping[str, object]) -> str:
    """`gptq` (v1, also where old files do not say) or `gptq_v2`."""
    named = described.get("checkpoint_format") or described.get("format") or "gptq"
    if described.get("is_marlin_format") or named == "marlin":
        raise _only_for_marlin()
    if named not in ("gptq", "gptq_v2"):
        raise UnreadableFormatError(f"quantized with GPTQ in the layout {named}")
    if described.get("pack_dtype", "int32") != "int32":
        raise UnreadableFormatError(f"quantized with GPTQ in words of {described['pack_dtype']}")
    return str(named)


def _only_for_marlin() -> UnreadableFormatError:
    """Marlin's repacking (IST-DASLab/marlin) serves its own inference kernel, which has no backward pass."""
    return UnreadableFormatError(
        "packed for the Marlin kernel only",
        cause="Marlin computes the forward pass only, and its layout is read by no other kernel.",
        fix="Choose a GPTQ version of the model in format gptq or gptq_v2; inference can repack that for Marlin.",
    )


def _written_by(described: Mapping[str, object]) -> str:
    """`gptqmodel:7.6.0` and the like, "" where the description does not tell."""
    meta = described.get("meta")
    told = meta.get("quantizer") if isinstance(meta, dict) else None
    first = told[0] if isinstance(told, list) and told else told
    return first if isinstance(first, str) else ""


def _description(checkpoint: StoredCheckpoint) -> Mapping[str, object]:
    described = checkpoint.config.get("quantization_config")
    if isinstance(described, dict) and "bits" in described:
        return described
    for name in ("quantize_config.json", "quant_config.json"):
        if (content := checkpoint.read_json(name)) is not None:
            return content
    raise checkpoint.contradiction("it has GPTQ tensors, but neither quantization_config nor quantize_config.json")


LAYOUT = CheckpointLayout("gptq", _recognizes, _read, (".scales", ".qzeros", ".g_idx"), weight=".qweight")


def _gptq(bits: int, level: str) -> FormatRecord:
    def packed_bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
        """The codes; per group and column a float16 scale and a zero point as wide as a code; a 4-byte group index an
        input."""
        groups = math.ceil(inputs / block_size) * outputs
        return (inputs * outputs + groups) * bits // 8 + groups * 2 + 4 * inputs

    return FormatRecord(
        name=f"int{bits}_gptq",
        title=f"{bits}-bit integers, per-group scale and zero point (GPTQ)",
        level=level,
        bits=bits,
        codec=GptqCodec(bits=bits),
        packed_bytes=packed_bytes,
        layout=LAYOUT,
        block_sizes=BLOCK_SIZES,
        within_rows=True,
        calibrated=True,
    )


GPTQ = (_gptq(4, level="4bit"), _gptq(8, level="8bit"))
