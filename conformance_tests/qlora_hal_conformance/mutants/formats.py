"""Weights stored or read wrongly: a wrong byte order, block, scale or offset gives numbers that look like weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.reference_backend.storage import (
    BlockwiseFourBit,
    Plain,
    RowwiseInt8,
    Stored,
    absmax_of,
    pack,
    unpack,
)
from qlora_hal_oracle import FourBitFormat, dequantize_four_bit
from qlora_hal_oracle.arrays import AnyFloat, Float64

from .registry import Mutant, with_rooms


def nibbles_swapped(stored: Stored) -> Float64:
    if isinstance(stored, BlockwiseFourBit):
        swapped = (stored.packed.packed << 4) | (stored.packed.packed >> 4)
        stored = replace(stored, packed=replace(stored.packed, packed=swapped.astype(np.uint8)))
    return unpack(stored)


def blocks_of_128_read_as_64(stored: Stored) -> Float64:
    if isinstance(stored, BlockwiseFourBit) and stored.packed.layout.block_size == 128:
        layout = replace(stored.packed.layout, block_size=64)
        absmax: Float64 = np.asarray(absmax_of(stored.packed, stored.nested), dtype=np.float64)
        return dequantize_four_bit(stored.packed.packed, np.concatenate([absmax, absmax]), layout)
    return unpack(stored)


def absmax_of_the_block_before(stored: Stored) -> Float64:
    if isinstance(stored, BlockwiseFourBit):
        absmax: Float64 = np.asarray(absmax_of(stored.packed, stored.nested), dtype=np.float64)
        return dequantize_four_bit(stored.packed.packed, np.roll(absmax, 1), stored.packed.layout)
    return unpack(stored)


def offset_dropped(stored: Stored) -> Float64:
    if isinstance(stored, BlockwiseFourBit) and stored.nested is not None:
        stored = replace(stored, nested=replace(stored.nested, offset=np.float32(0.0)))
    return unpack(stored)


def fp4_read_as_nf4(stored: Stored) -> Float64:
    if isinstance(stored, BlockwiseFourBit):
        layout = replace(stored.packed.layout, weight_format=FourBitFormat.NF4)
        return dequantize_four_bit(stored.packed.packed, absmax_of(stored.packed, stored.nested), layout)
    return unpack(stored)


def one_absmax_to_the_matrix(stored: Stored) -> Float64:
    if isinstance(stored, RowwiseInt8):
        stored = replace(stored, absmax=np.full_like(stored.absmax, stored.absmax.max()))
    return unpack(stored)


def block_size_ignored(weight: AnyFloat, quantization: Quantization) -> Stored:
    return pack(weight, replace(quantization, block_size=quantization.block_size and 64))


def default_block_of_another_format(weight: AnyFloat, quantization: Quantization) -> Stored:
    is_default = quantization.block_size == record_of(quantization.weight_format).default_block
    other = record_of(WeightFormat.INT4_GPTQ).default_block
    return pack(weight, replace(quantization, block_size=other) if is_default else quantization)


def double_quant_ignored(weight: AnyFloat, quantization: Quantization) -> Stored:
    return pack(weight, replace(quantization, double_quant=False))


def never_quantized(weight: AnyFloat, quantization: Quantization) -> Stored:
    return Plain(np.asarray(weight, dtype=np.float64))


MUTANTS = (
    Mutant(
        "nibble_order_swapped",
        "Reads the low nibble of each byte first.",
        ("20",),
        with_rooms(unpack=nibbles_swapped),
    ),
    Mutant(
        "block_128_read_as_64",
        "Reads weights that were quantized in blocks of 128 as blocks of 64.",
        ("20",),
        with_rooms(unpack=blocks_of_128_read_as_64),
        recreates="bitsandbytes#1873",
    ),
    Mutant(
        "absmax_of_a_neighbour",
        "Scales each block by the absmax of the block before it.",
        ("20",),
        with_rooms(unpack=absmax_of_the_block_before),
        recreates="bitsandbytes#1885",
    ),
    Mutant(
        "double_quant_offset_dropped",
        "Leaves out the mean that double quantization took off the absmax values.",
        ("20",),
        with_rooms(unpack=offset_dropped),
    ),
    Mutant(
        "fp4_read_with_the_nf4_codebook",
        "Decodes FP4 codes with the NF4 table.",
        ("20",),
        with_rooms(unpack=fp4_read_as_nf4),
    ),
    Mutant(
        "int8_scaled_by_one_absmax",
        "Scales every int8 row by the largest absmax of the matrix.",
        ("20",),
        with_rooms(unpack=one_absmax_to_the_matrix),
    ),
    Mutant(
        "block_size_ignored",
        "Quantizes in blocks of 64 whatever block size is asked for.",
        ("20",),
        with_rooms(pack=block_size_ignored),
        recreates="bitsandbytes#1873",
    ),
    Mutant(
        "default_block_of_another_format",
        "Quantizes in GPTQ's default blocks of 128 where the format's own default, 64, is asked for.",
        ("20",),
        with_rooms(pack=default_block_of_another_format),
    ),
    Mutant(
        "double_quant_declared_but_ignored",
        "Declares double quantization and keeps float32 absmax values.",
        ("20",),
        with_rooms(pack=double_quant_ignored),
        recreates="Soup v0.73.3: bnb_4bit_use_double_quant was read by nothing",
    ),
    Mutant(
        "never_quantizes",
        "Takes every quantized format for no quantization.",
        ("20",),
        with_rooms(pack=never_quantized),
        recreates="Soup v0.73.3: 4bit rewritten to none on Apple",
    ),
)
