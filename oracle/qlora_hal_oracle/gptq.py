"""The GPTQ checkpoint layout: `qweight`, `qzeros`, `scales`, `g_idx`, in both zero-point conventions.

Only the *storage* is defined here, and the plain rounding to a min-max grid. Which integers the GPTQ solver picks
(arXiv:2210.17323) is its own affair: a backend is judged by what it computes from the integers it stores.
Source of the layout: gptqmodel 7.6.0, `nn_modules/qlinear/__init__.py` and `utils/model_dequant.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from .arrays import AnyFloat, Float16, Float32, Float64, Int32, Int64
from .bit_packing import pack_bits, unpack_bits

CODE_BITS = (2, 3, 4, 8)
_FLOAT16_ROUNDOFF = 2.0**-11
_FLOAT16_HALF_SUBNORMAL = 2.0**-25
_FLOAT32_ROUNDOFF = 2.0**-24


class ZeroPointConvention(Enum):
    """The values are the `checkpoint_format` strings of `quantize_config.json`.

    V1 stores zero - 1 (modulo 2**bits), V2 stores zero. Reading one as the other shifts every weight by one step.
    """

    V1 = "gptq"
    V2 = "gptq_v2"


@dataclass(frozen=True, slots=True, eq=False)
class GptqWeight:
    """The tensors of one linear layer as they are stored.

    qweight int32 [in * bits / 32, out]; qzeros int32 [groups, out * bits / 32]; scales float16 [groups, out];
    g_idx int32 [in], the group of each input feature (not sorted when `desc_act` was on).
    """

    qweight: Int32
    qzeros: Int32
    scales: Float16
    g_idx: Int32
    bits: int
    convention: ZeroPointConvention


@dataclass(frozen=True, slots=True, eq=False)
class GptqGrid:
    """Step (float32) and zero point (integer) of each group and output: both `[groups, out]`."""

    steps: Float32
    zeros: Int64


def min_max_grid(weight: AnyFloat, g_idx: Int32, *, bits: int, symmetric: bool) -> GptqGrid:
    """The grid that GPTQ starts from, in float32: it covers the range of each group, and always zero.

    Asymmetric: step = (max - min) / (2**bits - 1), zero = round(-min / step). Symmetric: max = -min = largest
    magnitude, zero = 2**(bits - 1). Source: gptqmodel 7.6.0, `quantization/quantizer.py`, `find_params` (mse = 0).
    """
    rows = np.asarray(weight, dtype=np.float32)
    groups = range(int(g_idx.max()) + 1)
    low = np.stack([rows[:, g_idx == group].min(axis=1, initial=0.0) for group in groups])
    high = np.stack([rows[:, g_idx == group].max(axis=1, initial=0.0) for group in groups])
    if symmetric:
        high = np.maximum(np.abs(low), high)
        low = np.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = np.where(empty, np.float32(-1.0), low), np.where(empty, np.float32(1.0), high)
    steps = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    zeros = np.full(steps.shape, 2 ** (bits - 1)) if symmetric else np.rint(-low / steps)
    return GptqGrid(steps, zeros.astype(np.int64))


def round_to_grid(weight: AnyFloat, grid: GptqGrid, g_idx: Int32, *, bits: int) -> Int64:
    """Codes `[in, out]`: clip(round((w + zero * step) / step), 0, 2**bits - 1) in float32, as gptqmodel packs."""
    columns = np.asarray(weight, dtype=np.float32).T
    steps = grid.steps[g_idx]
    shifted = columns + (grid.zeros.astype(np.float32) * grid.steps)[g_idx]
    return np.clip(np.rint(shifted / steps), 0, 2**bits - 1).astype(np.int64)


def pack_gptq(codes: Int64, grid: GptqGrid, g_idx: Int32, *, bits: int, convention: ZeroPointConvention) -> GptqWeight:
    """Pack codes `[in, out]` along the input axis and zero points along the output axis.

    Raises ValueError for a zero point of 0 in V1: it would have to be stored as -1, and readers disagree there
    (gptqmodel's word arithmetic borrows from the neighbour field, others wrap within the field).
    """
    if bits not in CODE_BITS:
        raise ValueError(f"{bits} bits is not one of {CODE_BITS}")
    stored_zeros = grid.zeros
    if convention is ZeroPointConvention.V1:
        if (grid.zeros == 0).any():
            raise ValueError("a zero point of 0 has no unambiguous form in GPTQ v1; use v2")
        stored_zeros = grid.zeros - 1
    return GptqWeight(
        qweight=np.ascontiguousarray(pack_bits(codes.T, bits).T).view(np.int32),
        qzeros=pack_bits(stored_zeros, bits).view(np.int32),
        scales=grid.steps.astype(np.float16),
        g_idx=g_idx.astype(np.int32),
        bits=bits,
        convention=convention,
    )


def gptq_codes(stored: GptqWeight) -> tuple[Int64, Int64]:
    """(codes [in, out], zero points [groups, out]) read back from the packed words."""
    in_features, out_features = stored.g_idx.shape[0], stored.scales.shape[1]
    codes = unpack_bits(np.ascontiguousarray(stored.qweight.T), stored.bits).T[:in_features]
    zeros = unpack_bits(stored.qzeros, stored.bits)[:, :out_features].astype(np.int64)
    if stored.convention is ZeroPointConvention.V1:
        zeros = (zeros + 1) % 2**stored.bits
    return codes.astype(np.int64), zeros


def dequantize_gptq(stored: GptqWeight) -> Float64:
    """The stored weight `[out, in]`, exactly: scale[g] * (code - zero[g]) in float64, g = g_idx of the input."""
    codes, zeros = gptq_codes(stored)
    steps = stored.scales.astype(np.float64)[stored.g_idx]
    return np.ascontiguousarray((steps * (codes - zeros[stored.g_idx])).T)


def gptq_error_bound(weight: AnyFloat, grid: GptqGrid, g_idx: Int32, *, bits: int) -> Float64:
    """A bound `[out, in]` for |weight - decoded weight| after plain rounding to a grid.

    Inside the grid half a step s; outside it the distance to its end, which lies at -zero*s or
    (2**bits - 1 - zero)*s. A min-max grid leaves at most s/2 outside (asymmetric: the zero point is rounded by at most
    1/2; symmetric: the upper end lies half a step below the maximum), with one exception: a symmetric group without a
    negative weight has step max / (2**bits - 1) around zero and loses its upper half. GPTQ libraries do so.
    On top: the stored float16 scale is off by 2**-11 s (2**-25 where subnormal), times at most 2**bits - 1 steps; and
    float32 decides the rounding with an error of at most 4 u32 2**bits s.
    """
    steps = grid.steps.astype(np.float64)[g_idx].T
    zeros = grid.zeros[g_idx].T
    values = np.asarray(weight, dtype=np.float64)
    outside = np.maximum(values - (2**bits - 1 - zeros) * steps, -zeros * steps - values)
    halving = (2**bits - 1) * (_FLOAT16_ROUNDOFF * steps + _FLOAT16_HALF_SUBNORMAL)
    bound: Float64 = np.maximum(steps / 2.0, outside) + halving + 4.0 * _FLOAT32_ROUNDOFF * 2**bits * steps
    return bound
