"""Weights that are not quantized."""

from __future__ import annotations

from qlora_hal.formats.record import FormatRecord
from qlora_hal_oracle.codecs import UnquantizedCodec


def _bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
    return inputs * outputs * compute_bytes


UNQUANTIZED = FormatRecord(
    name="none",
    title="not quantized: the compute dtype",
    level="none",
    bits=16,
    codec=UnquantizedCodec(),
    packed_bytes=_bytes,
    layout=None,
)
