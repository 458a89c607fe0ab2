"""A weight format of one's own: `int4_rowwise`, 4-bit integers with one float32 scale to an output row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.record import CheckpointLayout, FormatRecord, Packing, StoredCheckpoint
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.arrays import AnyFloat, Float64
from qlora_hal_oracle.codecs import StoredTensors

NAME = "int4_rowwise"
LARGEST_CODE = 7
ZERO = 8
"""The code of zero: codes are stored without a sign, from 1 to 15."""


@dataclass(frozen=True, slots=True)
class Int4RowwiseCodec:
    """`.weight` uint8 [out, in / 2], two codes a byte, the earlier in the low nibble; `.scale` float32 [out].

    decoded = scale * (code - 8), with scale = absmax of the row / 7.
    """

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        """Raises ValueError for rows of an odd length: a byte belongs to one row."""
        rows = np.asarray(weight, dtype=np.float32)
        if rows.shape[1] % 2:
            raise ValueError(f"rows of {rows.shape[1]} weights: two codes to a byte do not divide them")
        scale = np.abs(rows).max(axis=1) / np.float32(LARGEST_CODE)
        codes = np.rint(rows / np.where(scale > 0, scale, np.float32(1.0))[:, None]).astype(np.int8) + ZERO
        return {".weight": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8), ".scale": scale}

    def dequantize(self, stored: StoredTensors) -> Float64:
        packed = stored[".weight"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.float64)
        return (codes - ZERO) * stored[".scale"].astype(np.float64)[:, None]

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        """Half a step; and float32 moves a quotient of at most 7 by two roundings of 2**-24 each."""
        scale = np.abs(np.asarray(weight, dtype=np.float64)).max(axis=1, keepdims=True) / LARGEST_CODE
        return np.broadcast_to(scale * (0.5 + 4 * LARGEST_CODE * 2.0**-24), weight.shape).copy()

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        return {"quantization_config": {"quant_method": NAME}}


def recognizes(checkpoint: StoredCheckpoint) -> bool:
    return checkpoint.quant_method == NAME


def read(checkpoint: StoredCheckpoint) -> Packing:
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".scale"):
        rows, octets = checkpoint.matrix(f"{module}.weight")
        if checkpoint.shape(f"{module}.scale") != (rows,):
            raise checkpoint.contradiction(f"{module}.scale does not hold one scale for each of {rows} rows")
        shapes[module] = LinearShape(2 * octets, rows)
    return Packing(Prequantized(NAME, NAME, None), shapes)


def packed_bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
    return outputs * (inputs // 2 + 4)


RECORD = FormatRecord(
    name=NAME,
    title="4-bit integers with one scale per output row",
    level="4bit",
    bits=4,
    codec=Int4RowwiseCodec(),
    packed_bytes=packed_bytes,
    layout=CheckpointLayout(NAME, recognizes, read, marks=(".scale",)),
)
