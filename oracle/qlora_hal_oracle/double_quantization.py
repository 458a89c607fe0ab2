"""Double quantization of the absmax values: 8-bit dynamic codes around their mean, one float32 to 256 blocks.

Stored by bitsandbytes as `absmax` (uint8), `nested_absmax`, `nested_quant_map` and the number `nested_offset`.
Source: bitsandbytes 0.50.2, `functional.quantize_4bit(compress_statistics=True)` and `quantize_blockwise`;
QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import AnyFloat, Float32, Float64, UInt8
from .codebooks import dynamic_8bit, nearest_entries, widest_rounding_distance

NESTED_BLOCK_SIZE = 256
# The CPU kernel looks the code up in a table of 2**16 equally spaced numbers in [-1, 1] (csrc/cpu_ops.cpp,
# `norm_to_lut_index`); the CUDA kernel searches the codebook itself. Both are within the bound below.
CPU_TABLE_SIZE = 65536
_FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedAbsmax:
    """`codes` uint8 [blocks], `nested_absmax` float32 [ceil(blocks/256)] and the mean that was taken off."""

    codes: UInt8
    nested_absmax: Float32
    offset: np.float32


def quantize_absmax(
    absmax: Float32, *, offset: np.float32 | None = None, through_cpu_table: bool = False
) -> QuantizedAbsmax:
    """Encode absmax values around `offset`, by default their mean.

    A library sums the mean in its own order, which may change its last bit; pass its stored offset to get its codes.
    """
    centre = np.float32(absmax.mean(dtype=np.float64)) if offset is None else offset
    centred = absmax - centre
    starts = np.arange(0, centred.size, NESTED_BLOCK_SIZE)
    nested_absmax = np.maximum.reduceat(np.abs(centred), starts)
    with np.errstate(divide="ignore"):
        reciprocal = np.float32(1.0) / np.repeat(nested_absmax, NESTED_BLOCK_SIZE)[: centred.size]
    alive = np.isfinite(reciprocal)
    normalized = np.clip(np.where(alive, centred * np.where(alive, reciprocal, 0.0), -1.0), -1.0, 1.0)
    if through_cpu_table:
        normalized = _snap_to_cpu_table(normalized.astype(np.float32))
    codes = nearest_entries(normalized.astype(np.float32), dynamic_8bit())
    return QuantizedAbsmax(codes, nested_absmax.astype(np.float32), np.float32(centre))


def _snap_to_cpu_table(normalized: Float32) -> Float32:
    one, half, last = np.float32(1.0), np.float32(0.5), np.float32(CPU_TABLE_SIZE - 1)
    index = ((normalized + one) * half * last + half).astype(np.int64)
    return -one + (np.float32(2.0) * index.astype(np.float32)) / last


def dequantize_absmax(
    codes: UInt8, nested_absmax: AnyFloat, offset: float | np.float32, *, codebook: Float32 | None = None
) -> Float64:
    """The absmax values that are stored, exactly: codebook[code] * nested_absmax + offset in float64.

    Give the checkpoint's own `nested_quant_map` as `codebook` when there is one.
    """
    entries = (dynamic_8bit() if codebook is None else codebook).astype(np.float64)[codes]
    scale = np.repeat(np.asarray(nested_absmax, dtype=np.float64), NESTED_BLOCK_SIZE)[: codes.size]
    return entries * scale + float(offset)


def absmax_error_bound(nested_absmax: AnyFloat, offset: float | np.float32, count: int) -> Float64:
    """A bound for |absmax - decoded absmax| of each of `count` blocks.

    With s the nested absmax, |absmax - offset| <= s, and the code is off by at most d = 0.00704 (half the widest gap
    of the dynamic codebook) plus, through the CPU table, half a table step 1/65535: (d + 1/65535) s. Float32: the
    subtraction, the product with 1/s and the table index cost at most 8 u s, decoding in float32 at most
    2 u (s + |offset|).
    """
    distance = widest_rounding_distance(dynamic_8bit()) + 1.0 / (CPU_TABLE_SIZE - 1)
    scale = np.repeat(np.asarray(nested_absmax, dtype=np.float64), NESTED_BLOCK_SIZE)[:count]
    return (distance + 10.0 * _FLOAT32_ROUNDOFF) * scale + 2.0 * _FLOAT32_ROUNDOFF * abs(float(offset))
