"""Quantizing to NF4 gives the bytes of bitsandbytes, and refuses what it would hide."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlora_hal.errors import ModelError
from qlora_hal.formats.four_bit import BLOCK_SIZES
from qlora_hal.formats.nf4_codes import NF4_TABLE, dynamic_table, encode, nest
from qlora_hal_backends.mlx_lora.nf4 import NestedAbsmax, quantize_nf4
from tests.mlx_nf4.bitsandbytes_nf4 import DTYPES, as_mlx, gaussian, library, quantized, torch

LARGE = (2560, 4096)  # 10.5 million weights


def assert_same_bytes(weight: torch.Tensor, block_size: int) -> None:
    packed, state = quantized(weight, block_size)
    ours = quantize_nf4(as_mlx(weight), block_size=block_size)
    assert isinstance(ours.absmax, mx.array)
    assert np.array_equal(np.array(ours.packed), packed.numpy().reshape(-1))
    assert np.array_equal(np.array(ours.absmax), state.absmax.numpy())


def test_both_tables_are_those_of_bitsandbytes_bit_for_bit() -> None:
    assert np.array_equal(NF4_TABLE, library.get_4bit_type("nf4", device="cpu").numpy())
    assert np.array_equal(dynamic_table(), library.create_dynamic_map().numpy())


@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_weights_get_the_codes_and_scales_of_bitsandbytes(dtype: str, block_size: int) -> None:
    assert_same_bytes(gaussian(*LARGE, dtype), block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(10, 96), (63, 65), (4, 4), (33, 4097)])
def test_blocks_across_rows_short_last_blocks_and_odd_counts_are_stored_alike(
    shape: tuple[int, int], block_size: int
) -> None:
    assert_same_bytes(gaussian(*shape), block_size)


def test_a_value_on_a_threshold_and_its_neighbours_fall_to_the_same_side() -> None:
    midpoints = (NF4_TABLE[:-1] + NF4_TABLE[1:]) / np.float32(2.0)
    exact = [midpoints, np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))]
    values = np.concatenate([*exact, NF4_TABLE, np.zeros(3, np.float32)]).reshape(1, 64)  # its absmax is 1
    assert_same_bytes(torch.from_numpy(np.concatenate([values, values * np.float32(0.37)])), 64)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 3e-39, 1.1e-38, 1e-30, 3e38])
def test_blocks_of_zeros_and_of_extreme_magnitudes_are_stored_alike(scale: float) -> None:
    unit = np.clip(np.random.default_rng(3).normal(size=(3, 40)), -1, 1)
    assert_same_bytes(torch.from_numpy((unit * scale).astype(np.float32)), 64)


def test_the_number_of_threads_does_not_change_a_byte() -> None:
    values = gaussian(1000, 777).numpy().reshape(-1)
    alone, shared = encode(values, 64, workers=1), encode(values, 64, workers=5)
    assert np.array_equal(alone[0], shared[0])
    assert np.array_equal(alone[1], shared[1])


@pytest.mark.parametrize("block_size", [64, 128])
def test_doubly_quantized_scales_get_the_codes_of_bitsandbytes_around_its_mean(block_size: int) -> None:
    weight = gaussian(*LARGE)
    _, plain = quantized(weight, block_size)
    _, state = quantized(weight, block_size, nested=True)
    nested = nest(plain.absmax.numpy(), offset=np.float32(state.offset.item()))
    assert np.array_equal(nested.codes, state.absmax.numpy())
    assert np.array_equal(nested.absmax, state.state2.absmax.numpy())


def test_equal_scales_get_the_codes_of_bitsandbytes() -> None:
    weight = torch.full((8, 64), 0.25)  # every scale is the mean: what is left has no magnitude to divide by
    _, state = quantized(weight, 64, nested=True)
    ours = quantize_nf4(as_mlx(weight), double_quant=True).absmax
    assert isinstance(ours, NestedAbsmax)
    assert np.array_equal(np.array(ours.codes), state.absmax.numpy())
    assert np.array_equal(np.array(ours.decode()), np.full(8, 0.25, np.float32))


def test_the_mean_taken_off_is_that_of_bitsandbytes_to_its_summation_error() -> None:
    weight = gaussian(*LARGE)
    _, state = quantized(weight, 64, nested=True)
    ours = quantize_nf4(as_mlx(weight), double_quant=True).absmax
    assert isinstance(ours, NestedAbsmax)
    # torch adds n float32 of one sign in pairs and short runs; sqrt(n) roundings bound that by far.
    count = state.absmax.numel()
    assert abs(ours.offset.item() - state.offset.item()) <= 2.0**-24 * count**0.5 * state.offset.item()


@pytest.mark.fault("M52")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float, dtype: str) -> None:
    weight = gaussian(8, 96, dtype)
    weight[7, 95] = bad  # in the short last block too
    with pytest.raises(ModelError, match=r"q_proj.weight holds NaN or infinity") as refusal:
        quantize_nf4(as_mlx(weight), block_size=256, name="q_proj.weight")
    assert refusal.value.code == "QH-M52"
    assert refusal.value.exit_status == 5


def test_a_block_size_or_shape_that_nf4_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="block size 48"):
        quantize_nf4(mx.zeros((4, 4)), block_size=48)
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        quantize_nf4(mx.zeros((4,)))
