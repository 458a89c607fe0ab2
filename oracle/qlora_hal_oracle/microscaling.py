"""Floats of 4 or 8 bits with one scale to a group of a row: MXFP4, MXFP8 (OCP Microscaling Formats 1.0) and NVFP4.

decoded = scale * element. Elements are E2M1 or E4M3; a scale is a power of two (E8M0) or an E4M3 number. Encoding
does what MLX 0.32.4 was seen to do: it rounds a scale's *exponent* up, so that no element is cut off, where the OCP
text rounds it down; and a value that rounds to zero gets the code of plus zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from .arrays import AnyFloat, Float32, Float64, UInt8, UInt32
from .bit_packing import pack_bits, unpack_bits
from .roundoff import UNIT_ROUNDOFF


class MicroscalingFormat(Enum):
    """The values are the names that MLX writes."""

    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"

    @property
    def bits(self) -> int:
        return 8 if self is MicroscalingFormat.MXFP8 else 4

    @property
    def group_size(self) -> int:
        return 16 if self is MicroscalingFormat.NVFP4 else 32

    @property
    def elements(self) -> Float64:
        """The value of every code, in the order of the codes; NaN where a code stands for none."""
        return E4M3 if self.bits == 8 else E2M1


def _e4m3() -> Float64:
    """Four exponent bits with bias 7, three mantissa bits; no infinity, and 0x7F is NaN (OCP 8-bit Floating Point)."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[127] = np.nan
    return np.concatenate([values, -values])


_E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1: Float64 = np.concatenate([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES])
E4M3: Float64 = _e4m3()
_LARGEST = {8: 448.0, 4: 6.0}
_WIDEST_GAP = {8: 32.0, 4: 2.0}
"""Between 416 and 448, and between 4 and 6."""
_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True, eq=False)
class MicroscalingWeight:
    """`packed` uint32 [out, in * bits / 32]; `scale_codes` uint8 [out, in / group]."""

    packed: UInt32
    scale_codes: UInt8
    weight_format: MicroscalingFormat

    @property
    def scales(self) -> Float64:
        """`[out, in / group]`, exactly."""
        if self.weight_format is MicroscalingFormat.NVFP4:
            decoded: Float64 = E4M3[self.scale_codes]
            return decoded
        return 2.0 ** (self.scale_codes.astype(np.float64) - _E8M0_BIAS)


def quantize_microscaling(weight: AnyFloat, weight_format: MicroscalingFormat) -> MicroscalingWeight:
    """Encode a weight `[out, in]`: s = max|w| / largest element, stored as its code; then the nearest element to w / s.
    Raises ValueError where groups do not divide the rows."""
    size, bits = weight_format.group_size, weight_format.bits
    if weight.shape[1] % size:
        raise ValueError(f"rows of {weight.shape[1]} weights: groups of {size} do not divide them")
    groups = np.asarray(weight, dtype=np.float32).reshape(weight.shape[0], -1, size)
    wanted = np.abs(groups).max(axis=-1) / np.float32(_LARGEST[bits])
    stored = MicroscalingWeight(np.zeros((0, 0), np.uint32), _scale_codes(wanted, weight_format), weight_format)
    scales = stored.scales
    safe = np.where(scales == 0.0, 1.0, scales)[..., None]
    ratios = np.where(scales[..., None] == 0.0, 0.0, groups / safe)
    codes = _nearest(ratios, weight_format.elements)
    return MicroscalingWeight(pack_bits(codes.reshape(weight.shape[0], -1), bits), stored.scale_codes, weight_format)


def _scale_codes(wanted: Float32, weight_format: MicroscalingFormat) -> UInt8:
    if weight_format is MicroscalingFormat.NVFP4:
        return _nearest(wanted.astype(np.float64), E4M3).astype(np.uint8)
    exponents = np.full(wanted.shape, -_E8M0_BIAS, dtype=np.int64)
    exponents[wanted > 0] = np.ceil(np.log2(wanted[wanted > 0])).astype(np.int64)
    return np.clip(exponents + _E8M0_BIAS, 0, 255).astype(np.uint8)


def _nearest(values: Float64, elements: Float64) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Codes of the nearest elements, by magnitude and sign, ties to the even mantissa; beyond the largest, it."""
    magnitudes = elements[: elements.size // 2]
    magnitudes = magnitudes[~np.isnan(magnitudes)]
    size = np.minimum(np.abs(values), magnitudes[-1])
    above = np.clip(np.searchsorted(magnitudes, size), 1, magnitudes.size - 1)
    low, high = magnitudes[above - 1], magnitudes[above]
    middle = (low + high) / 2.0
    takes_high = (size > middle) | ((size == middle) & (above % 2 == 0))
    codes = np.where(takes_high, above, above - 1)
    return np.where((values < 0.0) & (codes > 0), codes + elements.size // 2, codes)


def dequantize_microscaling(stored: MicroscalingWeight) -> Float64:
    """The stored weight `[out, in]`, exactly: scale * element in float64."""
    codes = unpack_bits(stored.packed, stored.weight_format.bits)
    elements = stored.weight_format.elements[codes].reshape(*stored.scales.shape, -1)
    decoded = elements * stored.scales[..., None]
    return decoded.reshape(stored.packed.shape[0], -1)


def microscaling_error_bound(stored: MicroscalingWeight, weight: AnyFloat) -> Float64:
    """A bound `[out, in]` for |weight - decoded weight|: half the widest gap of the elements, times the scale; and for
    what lies beyond the largest element, |w| - largest * scale, because a scale that is an E4M3 number may have been
    rounded down. Dividing by the scale in float32 may turn a tie: 4 u |w|."""
    bits, size = stored.weight_format.bits, stored.weight_format.group_size
    scales = np.repeat(stored.scales, size, axis=-1)
    magnitude = np.abs(np.asarray(weight, dtype=np.float64))
    bound = np.maximum(_WIDEST_GAP[bits] / 2.0 * scales, magnitude - _LARGEST[bits] * scales)
    return bound + 4.0 * UNIT_ROUNDOFF["float32"] * magnitude
