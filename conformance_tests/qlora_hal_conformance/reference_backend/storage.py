"""How a frozen weight is stored: one record for each format, packed and unpacked by the oracle's codecs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.formats.catalogue import record_of
from qlora_hal_oracle import (
    Codec,
    FourBitFormat,
    FourBitWeight,
    QuantizedAbsmax,
    StoredTensors,
    dequantize_absmax,
    dequantize_four_bit,
    dequantize_int8_rows,
    quantize_absmax,
    quantize_four_bit,
    quantize_int8_rows,
)
from qlora_hal_oracle.arrays import AnyFloat, Float32, Float64, Int8


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """Not quantized `[out, in]`."""

    weight: Float64


@dataclass(frozen=True, slots=True, eq=False)
class RowwiseInt8:
    """Bytes `[out, in]` and one absmax to a row."""

    codes: Int8
    absmax: Float32


@dataclass(frozen=True, slots=True, eq=False)
class BlockwiseFourBit:
    """NF4 or FP4. With `nested`, the absmax of `packed` is unused: it is held as 8-bit codes."""

    packed: FourBitWeight
    nested: QuantizedAbsmax | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Any other format, as its record's codec stores it: tensors by what follows the module's path."""

    tensors: StoredTensors
    codec: Codec


Stored = Plain | RowwiseInt8 | BlockwiseFourBit | Coded


def pack(weight: AnyFloat, quantization: Quantization) -> Stored:
    """Quantize a weight `[out, in]`."""
    match quantization.weight_format:
        case WeightFormat.NONE:
            return Plain(np.asarray(weight, dtype=np.float64))
        case WeightFormat.INT8:
            return RowwiseInt8(*quantize_int8_rows(weight))
        case WeightFormat.NF4 | WeightFormat.FP4 as four_bit:
            assert quantization.block_size is not None, "refused before a weight is read"
            packed = quantize_four_bit(
                weight, weight_format=FourBitFormat(four_bit.value), block_size=quantization.block_size
            )
            return BlockwiseFourBit(packed, quantize_absmax(packed.absmax) if quantization.double_quant else None)
        case other:
            codec = record_of(other).codec
            return Coded(codec.quantize(weight, quantization.block_size, quantization.double_quant), codec)


def unpack(stored: Stored) -> Float64:
    """The weight `[out, in]` that is stored, exactly."""
    match stored:
        case Plain(weight):
            return weight
        case RowwiseInt8(codes, absmax):
            return dequantize_int8_rows(codes, absmax)
        case BlockwiseFourBit(packed, nested):
            return dequantize_four_bit(packed.packed, absmax_of(packed, nested), packed.layout)
        case Coded(tensors, codec):
            return codec.dequantize(tensors)


def absmax_of(packed: FourBitWeight, nested: QuantizedAbsmax | None) -> Float32 | Float64:
    """One absmax to a block, out of its second quantization when there is one."""
    return packed.absmax if nested is None else dequantize_absmax(nested.codes, nested.nested_absmax, nested.offset)
