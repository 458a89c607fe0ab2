"""MXFP4, NVFP4 and MXFP8: scales and codes equal those of `mx.quantize`, and the bound holds."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from qlora_hal_oracle import (
    MicroscalingFormat,
    MicroscalingWeight,
    dequantize_microscaling,
    microscaling_error_bound,
    quantize_microscaling,
)
from qlora_hal_oracle.arrays import Float32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlx.core as mx

EACH_FORMAT = pytest.mark.parametrize("weight_format", MicroscalingFormat, ids=lambda f: f.value)


def weight(size: float = 1.0) -> Float32:
    """Gaussian rows, and rows that test the corners: zeros, a constant, one sign only, one outlier."""
    values = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    values[0] = 0.0
    values[1] = -0.37
    values[2] = np.abs(values[2]) + 1.0
    values[3, 5] = 40.0
    return (values * size).astype(np.float32)


@EACH_FORMAT
def test_everything_stored_equals_mlx_bit_for_bit(weight_format: MicroscalingFormat) -> None:
    ours = quantize_microscaling(weight(), weight_format)
    packed, scales = mx.quantize(mx.array(weight()), mode=weight_format.value)
    # A row of zeros holds no weight, whatever its scale.
    assert np.array_equal(ours.scale_codes[1:], np.array(scales)[1:])
    assert np.array_equal(ours.packed[1:], np.array(packed)[1:])


@EACH_FORMAT
def test_decoding_what_mlx_stores_gives_the_values_mlx_computes_with(weight_format: MicroscalingFormat) -> None:
    packed, scales = mx.quantize(mx.array(weight()), mode=weight_format.value)
    theirs = np.array(mx.dequantize(packed, scales, mode=weight_format.value, dtype=mx.float32))
    stored = MicroscalingWeight(np.array(packed), np.array(scales), weight_format)
    assert np.array_equal(theirs, dequantize_microscaling(stored))


@EACH_FORMAT
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-4])
def test_no_decoded_value_is_further_from_the_weight_than_the_bound(
    weight_format: MicroscalingFormat, size: float
) -> None:
    stored = quantize_microscaling(weight(size), weight_format)
    error = np.abs(weight(size) - dequantize_microscaling(stored))
    assert (error <= microscaling_error_bound(stored, weight(size))).all()


@EACH_FORMAT
def test_rows_that_groups_do_not_divide_are_refused(weight_format: MicroscalingFormat) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        quantize_microscaling(weight()[:, :40], weight_format)
