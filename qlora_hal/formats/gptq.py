"""GPTQ: integers of 4 or 8 bits with a scale and a zero point to a group (Frantar et al. 2022).

A module has `qweight` int32 [in * bits / 32, out], `scales` [groups, out], `qzeros` and `g_idx` [in] (auto-gptq 0.7.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

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
_OF_THE_NUMBERS = ("bits", "group_size", "sym", "desc_act", "pack_dtype", "checkpoint_format")
"""What decides how the codes are read: no two descriptions of one checkpoint may differ in it."""
_FILES = ("quantize_config.json", "quant_config.json")


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return _has_qweights(checkpoint) or _is_marlins(checkpoint)


def _has_qweights(checkpoint: StoredCheckpoint) -> bool:
    packed = any(name.endswith(".qweight") for name in checkpoint.tensors)
    return packed and checkpoint.quant_method in {"", "gptq"}


def _is_marlins(checkpoint: StoredCheckpoint) -> bool:
    return any(name.endswith(".B") and f"{name[:-1]}s" in checkpoint.tensors for name in checkpoint.tensors)


def _is_awqs(checkpoint: StoredCheckpoint) -> bool:
    """AutoAWQ's first checkpoints have GPTQ's names of tensors, other codes in them, and a description of their own."""
    described = checkpoint.read_json("quant_config.json")
    return described is not None and "w_bit" in described and "bits" not in described


def _read(checkpoint: StoredCheckpoint) -> Packing:
    if not _has_qweights(checkpoint):
        raise _only_for_marlin()
    if _is_awqs(checkpoint):
        raise UnreadableFormatError("quantized with AWQ (quant_config.json has w_bit)")
    described = _description(checkpoint)
    bits = checkpoint.whole("bits", described.get("bits"))
    if bits not in BITS:
        raise UnreadableFormatError(f"quantized with GPTQ in {bits} bits")
    convention = _convention(described)
    group_size = _group_size(checkpoint, described)
    shapes = {module: _shape(checkpoint, module, bits, group_size) for module in checkpoint.modules_with(".qweight")}
    settings = {key: described[key] for key in _SETTINGS if key in described}
    settings["checkpoint_format"] = convention
    if writer := _written_by(described):
        settings["quantizer"] = writer
    return Packing(Prequantized("gptq", f"int{bits}_gptq", group_size, False, settings), shapes)


def _shape(checkpoint: StoredCheckpoint, module: str, bits: int, group_size: int | None) -> LinearShape:
    absent = [part for part in ("qzeros", "scales", "g_idx") if f"{module}.{part}" not in checkpoint.tensors]
    if absent:
        raise checkpoint.contradiction(f"{module} has a qweight but no {', '.join(absent)}")
    rows, columns = checkpoint.matrix(f"{module}.qweight")
    inputs = rows * 32 // bits
    g_idx = checkpoint.shape(f"{module}.g_idx")
    if g_idx != (inputs,):
        raise checkpoint.contradiction(f"{module}.g_idx has shape {list(g_idx)}, {bits} bits give {inputs} inputs")
    groups, _ = checkpoint.matrix(f"{module}.scales")
    checkpoint.matrix(f"{module}.qzeros")
    if group_size is not None and groups != -(-inputs // group_size):
        raise checkpoint.contradiction(f"{module} has {groups} groups, group_size {group_size} gives another number")
    return LinearShape(inputs, columns)


def _group_size(checkpoint: StoredCheckpoint, described: Mapping[str, object]) -> int | None:
    """None for one group over all inputs, which is -1 or absent."""
    told = described.get("group_size", -1)
    return None if type(told) is int and told == -1 else checkpoint.whole("group_size", told)


def _convention(described: Mapping[str, object]) -> str:
    """`gptq` (v1, also where old files do not say) or `gptq_v2`."""
    named = described.get("checkpoint_format", "gptq")
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
    """All that is said of the quantization. transformers reads config.json, the GPTQ libraries read their own file
    where there is one; where the two differ, each library sees another model, and none of them is known to be right.

    Raises ModelError QH-C73 for no description and for several that contradict each other.
    """
    whole: dict[str, object] = {}
    told: dict[str, str] = {}
    for place, described in _descriptions(checkpoint):
        for key, word, value in _spoken(described):
            says = f"{word} is {value!r:.60} in {place}"
            if key in _OF_THE_NUMBERS and key in whole and whole[key] != value:
                raise checkpoint.contradiction(f"{told[key]}, {says}")
            whole.setdefault(key, value)
            told.setdefault(key, says)
    if not whole:
        raise checkpoint.contradiction("it has GPTQ tensors, but neither quantization_config nor quantize_config.json")
    return whole


def _descriptions(checkpoint: StoredCheckpoint) -> Iterator[tuple[str, Mapping[str, object]]]:
    in_config = checkpoint.config.get("quantization_config")
    found: dict[str, Mapping[str, object]] = {"config.json": in_config if isinstance(in_config, dict) else {}}
    found |= {name: content for name in _FILES if (content := checkpoint.read_json(name)) is not None}
    yield from ((place, described) for place, described in found.items() if "bits" in described)


def _spoken(described: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """(meaning, field, value) of the fields that say something. `format` is gptqmodel's name of `checkpoint_format`."""
    for field, value in described.items():
        if value is not None and (field, value) != ("is_marlin_format", False):
            yield "checkpoint_format" if field == "format" else field, field, value


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
