"""The codebooks of bitsandbytes, value for value, and the search for the nearest entry.

Every entry is the float32 that the library stores; decoding widens it to float64, which is exact.
Source: bitsandbytes 0.50.2, `functional.get_4bit_type` and `functional.create_dynamic_map`.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from .arrays import Float32, UInt8


class FourBitFormat(Enum):
    """The two 4-bit formats with a fixed codebook; the values are the names bitsandbytes writes."""

    NF4 = "nf4"
    FP4 = "fp4"


# Quantiles of a standard normal, scaled so that the ends are -1 and 1 and zero is an entry (QLoRA, arXiv:2305.14314,
# section 3). The list is sorted: the index is a rank.
NF4: Float32 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

# One sign bit, two exponent bits, one mantissa bit, in bit-pattern order: *not* sorted. The library divides by the
# largest entry, so 0.0625 / 12 = 0.00520833 is the smallest step; its own comments round that to 0.0052.
_FP4_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=np.float32)
FP4: Float32 = (np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES]) / np.float32(12.0)).astype(np.float32)

FOUR_BIT_CODEBOOKS = {FourBitFormat.NF4: NF4, FourBitFormat.FP4: FP4}


def dynamic_8bit() -> Float32:
    """The signed dynamic 8-bit codebook (256 sorted float32), which holds doubly quantized absmax values.

    For e = -6 .. 0 it has 2**(e + 6) entries of each sign: the midpoints of an equal division of [0.1, 1], times
    10**e; then 0 and 1. There is no -1, so the codebook is not symmetric. (Dettmers, arXiv:1511.04561.)
    """
    entries: list[Float32] = [np.array([0.0, 1.0], dtype=np.float32)]
    for exponent in range(-6, 1):
        edges = _float32_linspace(0.1, 1.0, 2 ** (exponent + 6) + 1)
        positive = (np.float32(10.0**exponent) * ((edges[:-1] + edges[1:]) / np.float32(2.0))).astype(np.float32)
        entries += [positive, -positive]
    return np.sort(np.concatenate(entries))


def _float32_linspace(start: float, stop: float, count: int) -> Float32:
    """`torch.linspace` in float32: up from the start in the first half, down from the end in the second.

    The library was built with fused multiply-add, which rounds once: hence the product in float64. A build without
    it may differ in the last bit, so judge a stored checkpoint by the codebook stored in it.
    """
    step = float((np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    rank = np.arange(count)
    rising = float(np.float32(start)) + step * rank
    falling = stop - step * (count - 1 - rank)
    return np.where(rank < count // 2, rising, falling).astype(np.float32)


def nearest_entries(values: Float32, codebook: Float32) -> UInt8:
    """Index of the nearest codebook entry; a value exactly on a midpoint takes the smaller entry.

    The midpoints are rounded to float32 as in the library, so equal inputs give equal codes.
    """
    order = np.argsort(codebook, kind="stable")
    ascending = codebook[order]
    midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2.0)
    return order[np.searchsorted(midpoints, values, side="left")].astype(np.uint8)


def widest_rounding_distance(codebook: Float32) -> float:
    """The largest distance from any number in [-1, 1] to its nearest codebook entry.

    Between two neighbours it is half their gap; outside the outermost entries it is the distance to -1 or 1
    (which matters for the dynamic codebook: it ends at -0.993).
    """
    ascending = np.sort(codebook.astype(np.float64))
    half_gaps = np.diff(ascending) / 2.0
    return float(max(half_gaps.max(), ascending[0] + 1.0, 1.0 - ascending[-1]))
