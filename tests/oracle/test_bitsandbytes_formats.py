"""NF4, FP4, double quantization and int8 agree with bitsandbytes: codes bit for bit, values to float32 rounding."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from qlora_hal_oracle import (
    FP4,
    NF4,
    FourBitFormat,
    FourBitLayout,
    absmax_error_bound,
    dequantize_absmax,
    dequantize_four_bit,
    dequantize_int8_rows,
    dynamic_8bit,
    four_bit_error_bound,
    int8_error_bound,
    quantize_absmax,
    quantize_four_bit,
    quantize_int8_rows,
)
from qlora_hal_oracle.arrays import Float32
from qlora_hal_oracle.codebooks import widest_rounding_distance
from qlora_hal_oracle.four_bit import BLOCK_SIZES, pack_nibbles, unpack_nibbles

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional
    import bitsandbytes.nn
    import torch
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

library: Any = bitsandbytes.functional
layers: Any = bitsandbytes.nn

pytestmark = pytest.mark.usefixtures("no_compiler")

FLOAT32_ROUNDOFF = 2.0**-24
FORMATS = list(FourBitFormat)


def weight(rows: int = 16, columns: int = 4096, seed: int = 1) -> Float32:
    """A Gaussian weight with an all-zero row and one outlier."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    values[3] = 0.0
    values[5, 7] = 25.0
    assert columns % max(BLOCK_SIZES) == 0, "the AVX-512 decoder of bitsandbytes is wrong when blocks cross rows"
    return values


def library_weight(values: Float32, four_bit: FourBitFormat, block_size: int, *, nested: bool = False) -> Any:
    return library.quantize_4bit(
        torch.from_numpy(values), blocksize=block_size, quant_type=four_bit.value, compress_statistics=nested
    )


def test_codebooks_are_those_of_bitsandbytes_value_for_value() -> None:
    assert np.array_equal(NF4, library.get_4bit_type("nf4", device="cpu").numpy())
    assert np.array_equal(FP4, library.get_4bit_type("fp4", device="cpu").numpy())
    assert np.array_equal(dynamic_8bit(), library.create_dynamic_map().numpy())


def test_the_widest_rounding_distances_are_the_published_ones() -> None:
    assert widest_rounding_distance(NF4) == pytest.approx((1.0 - 0.6961928009986877) / 2)
    assert widest_rounding_distance(FP4) == pytest.approx((12.0 - 8.0) / 12.0 / 2)
    # The dynamic codebook divides [0.1, 1] into 64 parts; its outermost gap is one part, its ends lie half a part in.
    assert widest_rounding_distance(dynamic_8bit()) == pytest.approx(0.9 / 64 / 2, rel=1e-4)


@pytest.mark.parametrize("four_bit", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_packed_bytes_and_absmax_equal_the_library_bit_for_bit(four_bit: FourBitFormat, block_size: int) -> None:
    values = weight()
    ours = quantize_four_bit(values, weight_format=four_bit, block_size=block_size)
    packed, state = library_weight(values, four_bit, block_size)
    assert np.array_equal(ours.packed, packed.numpy().reshape(-1))
    assert np.array_equal(ours.absmax, state.absmax.numpy())


@pytest.mark.parametrize("four_bit", FORMATS)
@pytest.mark.parametrize("size", [1, 63, 65, 130, 4097])
def test_a_short_last_block_and_an_odd_count_are_stored_as_the_library_stores_them(
    four_bit: FourBitFormat, size: int
) -> None:
    values = np.random.default_rng(2).normal(size=size).astype(np.float32)
    ours = quantize_four_bit(values, weight_format=four_bit, block_size=64)
    packed, state = library_weight(values, four_bit, 64)
    theirs = packed.numpy().reshape(-1)
    assert np.array_equal(unpack_nibbles(ours.packed, size), unpack_nibbles(theirs, size))
    assert np.array_equal(ours.absmax, state.absmax.numpy())


@pytest.mark.parametrize("four_bit", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_decoding_the_stored_bytes_gives_the_values_the_library_computes_with(
    four_bit: FourBitFormat, block_size: int
) -> None:
    values = weight()
    packed, state = library_weight(values, four_bit, block_size)
    absmax = state.absmax.numpy()
    ours = dequantize_four_bit(packed.numpy(), absmax, FourBitLayout(four_bit, block_size, values.shape))
    theirs = library.dequantize_4bit(packed, state).numpy()
    # One float32 product; FP4 entries may be written with 8 digits in a kernel, which is another rounding.
    assert np.abs(theirs - ours).max() <= 2 * FLOAT32_ROUNDOFF * absmax.max()


@pytest.mark.parametrize("four_bit", FORMATS)
def test_blocks_that_cross_rows_are_decoded_as_by_the_generic_decoder_of_the_library(four_bit: FourBitFormat) -> None:
    values = np.random.default_rng(3).normal(size=(10, 96)).astype(np.float32)
    packed, state = library_weight(values, four_bit, 64)
    layout = FourBitLayout(four_bit, 64, values.shape)
    ours = dequantize_four_bit(packed.numpy(), state.absmax.numpy(), layout)
    theirs = _dequantize_4bit_compute(
        packed.reshape(-1), state.absmax, state.code, 64, values.shape, torch.float32
    ).numpy()
    assert np.abs(theirs - ours).max() <= 2 * FLOAT32_ROUNDOFF * state.absmax.numpy().max()
    assert (np.abs(values - ours) <= four_bit_error_bound(state.absmax.numpy(), layout)).all()


@pytest.mark.parametrize("four_bit", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_decoded_value_is_further_from_the_weight_than_the_bound(four_bit: FourBitFormat, block_size: int) -> None:
    values = weight()
    stored = quantize_four_bit(values, weight_format=four_bit, block_size=block_size)
    layout = FourBitLayout(four_bit, block_size, values.shape)
    decoded = dequantize_four_bit(stored.packed, stored.absmax, layout)
    assert (np.abs(values - decoded) <= four_bit_error_bound(stored.absmax, layout)).all()


@pytest.mark.parametrize("four_bit", FORMATS)
def test_the_bound_is_sharp(four_bit: FourBitFormat) -> None:
    ascending = np.sort({FourBitFormat.NF4: NF4, FourBitFormat.FP4: FP4}[four_bit])
    gaps = np.diff(ascending)
    middle_of_widest = (ascending[gaps.argmax()] + ascending[gaps.argmax() + 1]) / 2
    values = np.zeros((1, 64), dtype=np.float32)
    values[0, :2] = [1.0, middle_of_widest]
    layout = FourBitLayout(four_bit, 64, values.shape)
    stored = quantize_four_bit(values, weight_format=four_bit, block_size=64)
    error = np.abs(values - dequantize_four_bit(stored.packed, stored.absmax, layout)).max()
    bound = four_bit_error_bound(stored.absmax, layout).max()
    # The bound keeps 4 u for float32; the rest of it is reached.
    assert bound * (1 - 32 * FLOAT32_ROUNDOFF) <= error <= bound


def test_swapped_nibbles_and_another_block_size_break_the_bound() -> None:
    values = weight()
    layout = FourBitLayout(FourBitFormat.NF4, 64, values.shape)
    stored = quantize_four_bit(values, weight_format=FourBitFormat.NF4, block_size=64)
    bound = four_bit_error_bound(stored.absmax, layout)
    swapped = pack_nibbles(unpack_nibbles(stored.packed, values.size).reshape(-1, 2)[:, ::-1].reshape(-1))
    assert (np.abs(values - dequantize_four_bit(swapped, stored.absmax, layout)) > bound).any()
    wrong_blocks = quantize_four_bit(values, weight_format=FourBitFormat.NF4, block_size=128)
    decoded = dequantize_four_bit(wrong_blocks.packed, stored.absmax, layout)
    assert (np.abs(values - decoded) > bound).any()


def test_a_block_size_the_library_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="block size 48"):
        quantize_four_bit(weight(), weight_format=FourBitFormat.NF4, block_size=48)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_doubly_quantized_absmax_equals_the_library_bit_for_bit(block_size: int) -> None:
    values = weight(rows=32)
    _, state = library_weight(values, FourBitFormat.NF4, block_size, nested=True)
    plain = quantize_four_bit(values, weight_format=FourBitFormat.NF4, block_size=block_size)
    offset = np.float32(state.offset.item())
    ours = quantize_absmax(plain.absmax, offset=offset, through_cpu_table=True)
    assert np.array_equal(ours.nested_absmax, state.state2.absmax.numpy())
    assert np.array_equal(ours.codes, state.absmax.numpy())
    assert state.state2.blocksize == 256
    # The mean of n values near 3, summed in float32 in blocks: sqrt(n) roundings at most.
    own_offset = quantize_absmax(plain.absmax).offset
    assert abs(own_offset - offset) <= FLOAT32_ROUNDOFF * np.sqrt(plain.absmax.size) * offset


@pytest.mark.parametrize("four_bit", FORMATS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_decoding_doubly_quantized_bytes_gives_the_values_the_library_computes_with(
    four_bit: FourBitFormat, block_size: int
) -> None:
    values = weight(rows=32)
    packed, state = library_weight(values, four_bit, block_size, nested=True)
    absmax = dequantize_absmax(
        state.absmax.numpy(), state.state2.absmax.numpy(), state.offset.item(), codebook=state.state2.code.numpy()
    )
    ours = dequantize_four_bit(packed.numpy(), absmax, FourBitLayout(four_bit, block_size, values.shape))
    theirs = library.dequantize_4bit(packed, state).numpy()
    # Decoding absmax takes a product and a sum in float32, decoding the weight a product: 2 + 2 roundings, and the
    # numbers added (nested absmax, offset) may be larger than their sum.
    largest = state.state2.absmax.numpy().max() + abs(state.offset.item())
    assert np.abs(theirs - ours).max() <= 4 * FLOAT32_ROUNDOFF * largest


@pytest.mark.parametrize("through_cpu_table", [False, True])
def test_no_doubly_quantized_value_is_further_from_the_weight_than_the_bound(through_cpu_table: bool) -> None:
    values = weight(rows=32)
    plain = quantize_four_bit(values, weight_format=FourBitFormat.NF4, block_size=64)
    nested = quantize_absmax(plain.absmax, through_cpu_table=through_cpu_table)
    absmax = dequantize_absmax(nested.codes, nested.nested_absmax, nested.offset)
    absmax_bound = absmax_error_bound(nested.nested_absmax, nested.offset, absmax.size)
    assert (np.abs(absmax - plain.absmax) <= absmax_bound).all()
    layout = FourBitLayout(FourBitFormat.NF4, 64, values.shape)
    decoded = dequantize_four_bit(plain.packed, absmax, layout)
    bound = four_bit_error_bound(absmax, layout, absmax_error=absmax_bound)
    assert (np.abs(values - decoded) <= bound).all()


def test_equal_absmax_values_survive_double_quantization_exactly() -> None:
    absmax = np.full(300, 2.5, dtype=np.float32)
    nested = quantize_absmax(absmax)
    assert np.array_equal(dequantize_absmax(nested.codes, nested.nested_absmax, nested.offset), absmax)


def test_int8_codes_and_row_absmax_equal_those_of_a_library_layer_bit_for_bit() -> None:
    values = weight()
    layer = layers.Linear8bitLt(values.shape[1], values.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = layers.Int8Params(torch.from_numpy(values), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    codes, absmax = quantize_int8_rows(values)
    assert layer.weight.dtype == torch.int8
    assert np.array_equal(codes, layer.weight.CB.numpy())
    assert np.array_equal(absmax, layer.weight.SCB.numpy())


def test_int8_decoding_equals_the_library_and_stays_within_the_bound() -> None:
    values = weight()
    codes, absmax = quantize_int8_rows(values)
    decoded = dequantize_int8_rows(codes, absmax)
    theirs = library.int8_vectorwise_dequant(torch.from_numpy(codes), torch.from_numpy(absmax)).numpy()
    # Two float32 products, and 1/127 written as a float32.
    assert (np.abs(theirs - decoded) <= 3 * FLOAT32_ROUNDOFF * absmax[:, None]).all()
    assert (np.abs(values - decoded) <= int8_error_bound(values, absmax)).all()
    # Half a step is reached to within a thousandth in so many values.
    assert np.abs(values - decoded)[10].max() > 0.97 * absmax[10] / 254
