"""Codes of 1 to 8 bits as one little-endian bit stream, cut into 32-bit words.

GPTQ and MLX share this layout: code i occupies the bits i*b .. i*b + b - 1 of the stream, bit 0 first. For b = 3, 5
and 6 a code may cross a word, which is what GPTQ writes as "10 codes, 2 + 1 bits, 10 codes, 1 + 2 bits, 10 codes"
and MLX as packs of 3 or 5 bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import UInt8, UInt32

WORD_BITS = 32


def pack_bits(codes: npt.NDArray[np.integer], bits: int) -> UInt32:
    """Pack the last axis: `[..., n]` codes to `[..., n * bits / 32]` words.

    Raises ValueError if a code does not fit in `bits`, or if the stream does not end on a word.
    """
    if codes.shape[-1] * bits % WORD_BITS:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole {WORD_BITS}-bit words")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(f"codes {codes.min()} .. {codes.max()} do not fit in {bits} bits")
    single_bits = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    stream = single_bits.reshape(*codes.shape[:-1], -1)
    octets = np.packbits(stream, axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<u4").astype(np.uint32)


def unpack_bits(words: npt.NDArray[np.integer], bits: int) -> UInt8:
    """Inverse of `pack_bits`; `words` may be int32 or uint32."""
    octets = np.ascontiguousarray(words.astype(np.uint32).astype("<u4")).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    single_bits = stream.reshape(*words.shape[:-1], -1, bits)
    return np.packbits(single_bits, axis=-1, bitorder="little")[..., 0]
