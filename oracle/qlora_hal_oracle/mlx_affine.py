"""MLX's affine format: codes of 2 to 8 bits, one scale and one bias to a group of a row.

decoded = scale * code + bias. Encoding follows the float32 steps of the CPU kernel (ml-explore/mlx,
`mlx/backend/cpu/quantized.cpp`, `quantize`), so that the packed words agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .arrays import AnyFloat, Float32, Float64, UInt32
from .bit_packing import pack_bits, unpack_bits
from .roundoff import UNIT_ROUNDOFF, round_to_bfloat16

CODE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_FLOAT16_HALF_SUBNORMAL = 2.0**-25
_SMALLEST_SCALE = np.float32(1e-7)

ScaleType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, eq=False)
class MlxAffineWeight:
    """`packed` uint32 [out, in * bits / 32]; `scales` and `biases` float32 [out, in / group_size].

    Scales stored as float16 or bfloat16 are held here as the float32 of the same value.
    """

    packed: UInt32
    scales: Float32
    biases: Float32
    bits: int
    group_size: int


def quantize_mlx_affine(
    weight: AnyFloat, *, bits: int, group_size: int, scale_type: ScaleType = "float32"
) -> MlxAffineWeight:
    """Encode a weight `[out, in]`. Raises ValueError for bits or group sizes MLX does not have.

    With n = 2**bits - 1 and e the end of the range that is larger in magnitude: s = (max - min) / n, negative if e is
    the maximum; q = round(e / s); then s = e / q and bias = e. So zero is code -e/s = -q steps from the bias and is
    kept exactly, and e is kept exactly; the far end may be cut off. code = clip(round((w - bias) / s), 0, n).
    """
    if bits not in CODE_BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"{bits} bits in groups of {group_size}: MLX has bits {CODE_BITS} and groups {GROUP_SIZES}")
    groups = _in_scale_type(np.asarray(weight, dtype=np.float32), scale_type)
    groups = groups.reshape(weight.shape[0], -1, group_size)
    largest_code = np.float32(2**bits - 1)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    low_is_larger = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / largest_code, _SMALLEST_SCALE)
    step = np.where(low_is_larger, step, -step)
    edge = np.where(low_is_larger, low, high)
    edge_code = np.rint(edge / step)
    holds_edge = edge_code != 0
    scales = np.where(holds_edge, edge / np.where(holds_edge, edge_code, 1.0), step).astype(np.float32)
    biases = np.where(holds_edge, edge, np.float32(0.0)).astype(np.float32)
    codes = np.clip(np.rint((groups - biases[..., None]) / scales[..., None]), 0, largest_code).astype(np.int64)
    # The codes come from the float32 scale and bias; only what is stored is rounded to the weight's own type.
    return MlxAffineWeight(
        pack_bits(codes.reshape(weight.shape[0], -1), bits),
        _in_scale_type(scales, scale_type),
        _in_scale_type(biases, scale_type),
        bits,
        group_size,
    )


def _in_scale_type(values: Float32, scale_type: ScaleType) -> Float32:
    if scale_type == "bfloat16":
        return round_to_bfloat16(values)
    return values.astype(np.dtype(scale_type)).astype(np.float32)


def dequantize_mlx_affine(stored: MlxAffineWeight) -> Float64:
    """The stored weight `[out, in]`, exactly: scale * code + bias in float64."""
    codes = unpack_bits(stored.packed, stored.bits).astype(np.float64)
    groups = codes.reshape(*stored.scales.shape, stored.group_size)
    decoded = groups * stored.scales.astype(np.float64)[..., None] + stored.biases.astype(np.float64)[..., None]
    return decoded.reshape(stored.packed.shape[0], -1)


def mlx_affine_error_bound(stored: MlxAffineWeight, *, scale_type: ScaleType = "float32") -> Float64:
    """A bound `[out, in]` for |weight - decoded weight|: about *one* step of the group, not half.

    Let n = 2**bits - 1, s0 = (max - min) / n, e = |edge| / s0, q = round(e) and s = s0 e / q the final step. Inside
    the range of the codes the error is s/2. The codes cover n s from the edge; the range is n s0, so the far end is
    cut off by n (s0 - s) = n s0 (q - e) / q when q > e. There q - e <= 1/2, and q >= n/2 because the edge is the
    larger end, so the loss is at most s0; and s0 = s q / e <= s (1 + 1/(2e)) <= s (1 + 1/n). Hence s (1 + 1/n).
    The stored scale and bias are rounded to their type: u (n s + |bias|), in float16 also 2**-25 each where they are
    subnormal, which counts n + 3 times (n steps, the two of the excess over s, the bias). Float32 decides with an error
    of at most 4 u32 (n s + |bias|).
    """
    largest_code = 2**stored.bits - 1
    step = np.abs(stored.scales.astype(np.float64))
    reach = largest_code * step + np.abs(stored.biases.astype(np.float64))
    storage = UNIT_ROUNDOFF[scale_type] * reach + 4.0 * UNIT_ROUNDOFF["float32"] * reach
    if scale_type == "float16":
        storage = storage + (largest_code + 3) * _FLOAT16_HALF_SUBNORMAL
    per_group = step * (1.0 + 1.0 / largest_code) + storage
    return np.repeat(per_group, stored.group_size, axis=-1)
