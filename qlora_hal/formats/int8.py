"""LLM.int8's weights: 8-bit integers with one absmax to an output row (Dettmers et al. 2022), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Collection

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.record import (
    CheckpointLayout,
    FormatRecord,
    Packing,
    StoredCheckpoint,
    UnreadableFormatError,
)
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.codecs import Int8Codec


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return any(name.endswith(".SCB") for name in checkpoint.tensors)


def _read(checkpoint: StoredCheckpoint) -> Packing:
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".SCB"):
        shape = checkpoint.shape(f"{module}.weight")
        if len(shape) != 2 or checkpoint.shape(f"{module}.SCB") != shape[:1]:
            raise checkpoint.contradiction(f"{module}.SCB does not hold one scale for each row of {list(shape)}")
        stored, scales = checkpoint.tensors[f"{module}.weight"].dtype, checkpoint.tensors[f"{module}.SCB"].dtype
        if stored != "I8" or scales not in ("F32", "F16", "BF16"):
            raise checkpoint.contradiction(
                f"{module} has its weight in {stored} and its scales in {scales}; I8 and F32 are expected"
            )
        shapes[module] = LinearShape(shape[1], shape[0])
    _check_layouts(checkpoint, shapes)
    return Packing(Prequantized("bitsandbytes", "int8", None, False, {"bits": 8}), shapes)


def _check_layouts(checkpoint: StoredCheckpoint, modules: Collection[str]) -> None:
    """Every layout is that of rows, which is 0, and stands beside scales. Raises ModelError QH-C73 and
    UnreadableFormatError."""
    for module in checkpoint.modules_with(".weight_format"):
        if module not in modules:
            raise checkpoint.contradiction(f"{module} has a weight_format and no SCB")
        if any(checkpoint.read_bytes(f"{module}.weight_format")):
            raise UnreadableFormatError(f"quantized with bitsandbytes int8 in tiles of a GPU ({module})")


def _bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
    """A byte a weight and a float32 a row."""
    return inputs * outputs + 4 * outputs


LAYOUT = CheckpointLayout(
    "bitsandbytes", _recognizes, _read, (".SCB", ".weight_format"), constant=(".weight_format",), on_load=True
)

INT8 = FormatRecord(
    name="int8",
    title="8-bit integers with one absmax per output row (LLM.int8)",
    level="8bit",
    bits=8,
    codec=Int8Codec(),
    packed_bytes=_bytes,
    layout=LAYOUT,
)
