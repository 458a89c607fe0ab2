"""NF4 and FP4 as bitsandbytes stores them: two codes to a byte, one absmax to a block of the flattened weight.

The flattened weight is `[out, in]` in row-major order: unless `in` is divisible by the block size, blocks cross rows.
Hazard: the AVX-512 decoder of bitsandbytes 0.50.2 (csrc/cpu_ops.cpp, `dequantizeBlockwise4bitCpu`) numbers the blocks
row by row and so is wrong, without an error, in exactly that case; its generic decoder and this module agree.

Encoding follows the library's float32 steps, because a rounding decision is part of the stored bytes; decoding is exact
float64 from what is stored. Source: bitsandbytes 0.50.2, `backends/default/ops.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arrays import AnyFloat, Float32, Float64, UInt8
from .codebooks import FOUR_BIT_CODEBOOKS, FourBitFormat, nearest_entries, widest_rounding_distance

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SMALLEST_DIVISOR = np.float32(1e-38)
_FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True)
class FourBitLayout:
    """How stored bytes are to be read. Raises ValueError for a block size the library does not have."""

    weight_format: FourBitFormat
    block_size: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block size {self.block_size} is not one of {BLOCK_SIZES}")

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class FourBitWeight:
    """What is stored of one weight: `packed` uint8 [ceil(n/2)], `absmax` float32 [ceil(n/block_size)]."""

    packed: UInt8
    absmax: Float32
    layout: FourBitLayout


def quantize_four_bit(weight: AnyFloat, *, weight_format: FourBitFormat, block_size: int) -> FourBitWeight:
    """Encode a weight: each block divided by its largest magnitude, each quotient to its nearest codebook entry."""
    layout = FourBitLayout(weight_format, block_size, weight.shape)
    flat = np.asarray(weight, dtype=np.float32).reshape(-1)
    absmax, normalized = _normalize_blocks(flat, block_size)
    codes = nearest_entries(normalized, FOUR_BIT_CODEBOOKS[weight_format])
    return FourBitWeight(pack_nibbles(codes), absmax, layout)


def _normalize_blocks(flat: Float32, block_size: int) -> tuple[Float32, Float32]:
    """(absmax of each block, the values divided by it and clipped to [-1, 1]), rounded as the library rounds.

    A full block is multiplied by the reciprocal, a last short block is divided: the two round differently. An
    all-zero block keeps absmax 0 when full and 1e-38 when short; both decode to 0.
    """
    whole = flat.size - flat.size % block_size
    blocks = flat[:whole].reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, initial=0.0)
    reciprocal = np.float32(1.0) / np.maximum(absmax, _SMALLEST_DIVISOR)
    normalized = np.clip(blocks * reciprocal[:, None], -1.0, 1.0).reshape(-1)
    if whole < flat.size:
        last = np.maximum(np.abs(flat[whole:]).max(), _SMALLEST_DIVISOR)
        absmax = np.append(absmax, last)
        normalized = np.append(normalized, np.clip(flat[whole:] / last, -1.0, 1.0))
    return absmax.astype(np.float32), normalized.astype(np.float32)


def pack_nibbles(codes: UInt8) -> UInt8:
    """Two codes to a byte, the earlier one in the *high* nibble; an odd count is filled with the bits 0000.

    The library fills with the code of the value 0; the filler is never decoded.
    """
    padded = np.append(codes, np.uint8(0)) if codes.size % 2 else codes
    return np.asarray((padded[0::2] << 4) | padded[1::2], dtype=np.uint8)


def unpack_nibbles(packed: UInt8, count: int) -> UInt8:
    """The first `count` codes of packed bytes, high nibble first."""
    flat = packed.reshape(-1)
    return np.stack([flat >> 4, flat & 0xF], axis=1).reshape(-1)[:count]


def dequantize_four_bit(packed: UInt8, absmax: AnyFloat, layout: FourBitLayout) -> Float64:
    """The stored weight, exactly: codebook[code] * absmax[block] in float64.

    `absmax` may be the float32 that is stored, or the float64 that `dequantize_absmax` gives.
    """
    codebook = FOUR_BIT_CODEBOOKS[layout.weight_format].astype(np.float64)
    return codebook[unpack_nibbles(packed, layout.count)].reshape(layout.shape) * _per_value(absmax, layout)


def four_bit_error_bound(absmax: AnyFloat, layout: FourBitLayout, *, absmax_error: AnyFloat | float = 0.0) -> Float64:
    """A bound for |weight - decoded weight| at every position.

    Let a be the block's largest magnitude, d the largest distance from [-1, 1] to the codebook (half its widest gap:
    0.15190 for NF4, 1/6 for FP4) and c the chosen entry. In exact arithmetic |w/a - c| <= d, so |w - c a| <= d a.
    Float32 adds at most 4 u a: two roundings of w * (1/a) and one of the midpoint can move a value that close to a
    midpoint to the other side, one more is kept for absmax itself. If a' != a is stored (double quantization),
    |w - c a'| <= |w - c a| + |c| |a - a'|, and |c| <= 1: `absmax_error` is added. `absmax` is the exact a (or a').
    """
    distance = widest_rounding_distance(FOUR_BIT_CODEBOOKS[layout.weight_format]) + 4.0 * _FLOAT32_ROUNDOFF
    true_absmax = np.abs(np.asarray(absmax, dtype=np.float64)) + absmax_error
    return _per_value(distance * true_absmax + absmax_error, layout)


def _per_value(per_block: AnyFloat, layout: FourBitLayout) -> Float64:
    values = np.repeat(np.asarray(per_block, dtype=np.float64).reshape(-1), layout.block_size)
    return values[: layout.count].reshape(layout.shape)
