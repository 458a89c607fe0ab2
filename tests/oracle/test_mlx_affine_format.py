"""MLX's affine format: packed words, scales and biases equal those of `mx.quantize` bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from qlora_hal_oracle import (
    UNIT_ROUNDOFF,
    MlxAffineWeight,
    dequantize_mlx_affine,
    mlx_affine_error_bound,
    quantize_mlx_affine,
    round_to_bfloat16,
)
from qlora_hal_oracle.arrays import Float32
from qlora_hal_oracle.mlx_affine import CODE_BITS, GROUP_SIZES, ScaleType

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlx.core as mx
    import torch

SCALE_TYPES: list[ScaleType] = ["float32", "float16", "bfloat16"]


def weight() -> Float32:
    """Gaussian rows, and rows that test the corners: zeros, a constant, one sign only, one outlier, tiny values."""
    values = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    values[0] = 0.0
    values[1] = -0.37
    values[2] = np.abs(values[2]) + 1.0
    values[3, 5] = 40.0
    values[4] *= 1e-8
    values[5] = -np.abs(values[5])
    return values


def quantized_by_mlx(values: Float32, bits: int, group_size: int, scale_type: ScaleType) -> Any:
    return mx.quantize(mx.array(values).astype(getattr(mx, scale_type)), group_size=group_size, bits=bits)


def as_float32(array: Any) -> Float32:
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_everything_stored_equals_mlx_bit_for_bit(bits: int, group_size: int, scale_type: ScaleType) -> None:
    ours = quantize_mlx_affine(weight(), bits=bits, group_size=group_size, scale_type=scale_type)
    packed, scales, biases = quantized_by_mlx(weight(), bits, group_size, scale_type)
    assert np.array_equal(ours.packed, np.array(packed))
    assert np.array_equal(ours.scales, as_float32(scales))
    assert np.array_equal(ours.biases, as_float32(biases))


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_decoding_what_mlx_stores_gives_the_values_mlx_computes_with(bits: int, scale_type: ScaleType) -> None:
    packed, scales, biases = quantized_by_mlx(weight(), bits, 64, scale_type)
    theirs = as_float32(mx.dequantize(packed, scales, biases, group_size=64, bits=bits))
    stored = MlxAffineWeight(np.array(packed), as_float32(scales), as_float32(biases), bits, 64)
    # scale * code and + bias are each rounded in the type of the scales; their sizes are bounded by the group's reach.
    reach = (2**bits - 1) * np.abs(stored.scales) + np.abs(stored.biases)
    allowed = 2 * UNIT_ROUNDOFF[scale_type] * np.repeat(reach, 64, axis=1) + FLOAT16_SMALLEST
    assert (np.abs(theirs - dequantize_mlx_affine(stored)) <= allowed).all()


# float16 has no number between 0 and this; products of tiny scales land there.
FLOAT16_SMALLEST = 2.0**-24


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_no_decoded_value_is_further_from_the_weight_than_one_step(bits: int, group_size: int) -> None:
    stored = quantize_mlx_affine(weight(), bits=bits, group_size=group_size)
    error = np.abs(weight() - dequantize_mlx_affine(stored))
    assert (error <= mlx_affine_error_bound(stored)).all()


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_the_bound_holds_for_scales_stored_in_half_precision_also_where_float16_is_subnormal(
    scale_type: ScaleType, size: float
) -> None:
    # A weight of that type: MLX quantizes what it is given.
    halves = {"float32": lambda w: w, "float16": lambda w: w.astype(np.float16), "bfloat16": round_to_bfloat16}
    values = halves[scale_type]((weight()[5:] * size).astype(np.float32)).astype(np.float32)
    for bits in CODE_BITS:
        stored = quantize_mlx_affine(values, bits=bits, group_size=64, scale_type=scale_type)
        error = np.abs(values - dequantize_mlx_affine(stored))
        assert (error <= mlx_affine_error_bound(stored, scale_type=scale_type)).all()


def test_half_a_step_is_not_a_bound_and_one_step_is_nearly_reached() -> None:
    # Range 15 s0 with the edge at -7.5 s0: the edge code rounds from 7.5 to 8, the far end is cut off by 15/16 s0.
    values = np.zeros((1, 32), dtype=np.float32)
    values[0, :2] = [-7.5, 7.4999]
    stored = quantize_mlx_affine(values, bits=4, group_size=32)
    error = np.abs(values - dequantize_mlx_affine(stored)).max()
    step = np.abs(stored.scales).max()
    assert 0.99 * step < error <= mlx_affine_error_bound(stored).max()


def test_zero_is_kept_exactly() -> None:
    values = weight()
    values[:, ::32] = 0.0
    decoded = dequantize_mlx_affine(quantize_mlx_affine(values, bits=4, group_size=32))
    straddling = (values.reshape(64, 8, 32).min(-1) < 0) & (values.reshape(64, 8, 32).max(-1) > 0)
    # Zero is edge - (edge / q) q; the stored scale is edge / q rounded to float32.
    at_zero = np.abs(decoded[:, ::32])[straddling]
    assert at_zero.max() <= 2 * UNIT_ROUNDOFF["float32"] * np.abs(values).max()


def test_rounding_to_bfloat16_equals_torch_bit_for_bit() -> None:
    values = np.random.default_rng(2).normal(size=100000).astype(np.float32)
    ties = (np.arange(256, dtype=np.uint32) << 16 | 0x3F808000).view(np.float32)
    values = np.concatenate([values, ties, -ties, np.zeros(1, np.float32)])
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(round_to_bfloat16(values), expected)


@pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (4, 48)])
def test_what_mlx_lacks_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="MLX has bits"):
        quantize_mlx_affine(weight(), bits=bits, group_size=group_size)
