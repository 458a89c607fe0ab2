"""NF4 as bitsandbytes stores it, encoded in numpy and fast enough for whole models: the same codes and absmax values on
every machine, bit for bit. The oracle's codec is what they are judged by (`tests/mlx_nf4`).

The weight is flattened row by row and cut into blocks; each block is divided by its largest magnitude (absmax) and each
quotient becomes the index of its nearest table entry (QLoRA, arXiv:2305.14314, section 3). With double quantization the
absmax values are stored as 8-bit codes around their mean.

A rounding decision is part of the stored bytes, so the float32 steps follow bitsandbytes 0.50.2 (`backends/default/
ops.py` and, for the 8-bit codes, `csrc/cpu_ops.cpp`). They run on the host: Metal flushes subnormal numbers to zero.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from qlora_hal_oracle.codebooks import NF4, dynamic_8bit
from qlora_hal_oracle.double_quantization import NESTED_BLOCK_SIZE

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

NF4_TABLE: Float32 = NF4.copy()
NF4_TABLE.flags.writeable = False

_MIDPOINTS = (NF4_TABLE[:-1] + NF4_TABLE[1:]) / np.float32(2.0)
_SMALLEST_DIVISOR = np.float32(1e-38)
_CHUNK = 1 << 17  # values: 512 KiB of float32 stay in a core's cache during the fifteen comparisons
_DYNAMIC_STEPS = 65535  # bitsandbytes looks 8-bit codes up on this many equal steps from -1 to 1


@dataclass(frozen=True, slots=True, eq=False)
class NestedCodes:
    """Doubly quantized absmax values: `codes` uint8 [blocks], `absmax` float32 [ceil(blocks / 256)], their mean."""

    codes: UInt8
    absmax: Float32
    offset: np.float32


def encode(values: Float32, block_size: int, *, workers: int | None = None) -> tuple[UInt8, Float32]:
    """(two codes a byte, the earlier in the high nibble; absmax of each block) of flat float32 values.

    A value on the midpoint of two entries takes the lower one. An odd count is filled up with the code of zero.
    """
    packed = np.empty(-(-values.size // 2), dtype=np.uint8)
    absmax = np.empty(-(-values.size // block_size), dtype=np.float32)

    def encode_chunk(start: int) -> None:
        stop = min(start + _CHUNK, values.size)
        normalized = _normalized(values[start:stop], block_size, absmax[start // block_size :])
        packed[start // 2 : -(-stop // 2)] = _pack(_nearest(normalized))

    starts = range(0, values.size, _CHUNK)  # a multiple of every block size
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as threads:
        for _ in threads.map(encode_chunk, starts):  # numpy computes outside the interpreter's lock
            pass
    return packed, absmax


def _normalized(values: Float32, block_size: int, absmax: Float32) -> Float32:
    """Values over the absmax of their block, which is written to `absmax`.

    A full block is multiplied by the reciprocal, a last short one is divided: they round differently. A block of zeros
    keeps absmax 0 when full, 1e-38 when short; both decode to zero.
    """
    full = values.size - values.size % block_size
    blocks = values[:full].reshape(-1, block_size)
    count = len(blocks)
    np.maximum(blocks.max(axis=1, initial=0.0), -blocks.min(axis=1, initial=0.0), out=absmax[:count])
    normalized = np.empty_like(values)
    reciprocals = np.float32(1.0) / np.maximum(absmax[:count], _SMALLEST_DIVISOR)
    with np.errstate(invalid="ignore"):  # infinity times 0, in a weight that is refused
        np.multiply(blocks, reciprocals[:, None], out=normalized[:full].reshape(-1, block_size))
    if full < values.size:
        absmax[count] = np.maximum(np.abs(values[full:]).max(), _SMALLEST_DIVISOR)
        np.divide(values[full:], absmax[count], out=normalized[full:])
    return normalized


def _nearest(normalized: Float32) -> UInt8:
    """The number of midpoints below each value: fifteen passes of comparisons, ten times faster than a search."""
    codes = np.zeros(normalized.size, dtype=np.uint8)
    for midpoint in _MIDPOINTS:
        codes += normalized > midpoint
    return codes


def _pack(codes: UInt8) -> UInt8:
    if codes.size % 2:
        codes = np.append(codes, np.uint8(np.flatnonzero(NF4_TABLE == 0)[0]))
    pairs = codes.view("<u2")
    return ((pairs << 4) | (pairs >> 8)).astype(np.uint8)


def nest(absmax: Float32, *, offset: np.float32 | None = None) -> NestedCodes:
    """Absmax values as 8-bit codes. `offset` is what is taken off first: by default their correctly rounded mean.

    bitsandbytes sums the mean in float32, in an order that depends on the processor, so its last bits may differ; with
    its offset given, codes and nested absmax are its own.
    """
    centre = np.float32(absmax.mean(dtype=np.float64)) if offset is None else offset
    centred = absmax - centre
    nested_absmax = np.maximum.reduceat(np.abs(centred), np.arange(0, centred.size, NESTED_BLOCK_SIZE))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        reciprocals = np.float32(1.0) / _per_block(nested_absmax, centred.size)
        normalized = np.clip(centred * reciprocals, np.float32(-1.0), np.float32(1.0))
    normalized = np.where(np.isfinite(reciprocals), normalized, np.float32(-1.0))
    table = dynamic_table()
    midpoints = (table[:-1] + table[1:]) / np.float32(2.0)
    codes = np.searchsorted(midpoints, _on_steps(normalized), side="left").astype(np.uint8)
    return NestedCodes(codes, nested_absmax, centre)


def _on_steps(normalized: Float32) -> Float32:
    half, steps = np.float32(0.5), np.float32(_DYNAMIC_STEPS)
    step = ((normalized + np.float32(1.0)) * half * steps + half).astype(np.int32)
    return np.float32(-1.0) + np.float32(2.0) * step.astype(np.float32) / steps


def _per_block(nested: Float32, count: int) -> Float32:
    return np.repeat(nested, NESTED_BLOCK_SIZE)[:count]


@cache
def dynamic_table() -> Float32:
    """The signed 8-bit dynamic table, 256 ascending float32 (Dettmers 2015, arXiv:1511.04561, as bitsandbytes has it).
    Judge a stored checkpoint by the table it brings along."""
    table = dynamic_8bit()
    table.flags.writeable = False
    return table


def byte_pairs() -> Float32:
    """`[256, 2]`: the two table values that each packed byte stands for."""
    byte = np.arange(256)
    return NF4_TABLE[np.stack([byte >> 4, byte & 15], axis=1)]
