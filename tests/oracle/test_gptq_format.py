"""The GPTQ layout: our words are those gptqmodel packs, and its kernel reads ours to the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from qlora_hal_oracle import (
    GptqGrid,
    GptqWeight,
    ZeroPointConvention,
    dequantize_gptq,
    gptq_codes,
    gptq_error_bound,
    min_max_grid,
    pack_gptq,
    round_to_grid,
)
from qlora_hal_oracle.arrays import Float32, Int32
from qlora_hal_oracle.bit_packing import pack_bits, unpack_bits
from qlora_hal_oracle.gptq import CODE_BITS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

pytestmark = pytest.mark.usefixtures("no_compiler")

V1, V2 = ZeroPointConvention.V1, ZeroPointConvention.V2
OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 64, 128, 32
FLOAT32_ROUNDOFF = 2.0**-24


def weight() -> Float32:
    values = np.random.default_rng(1).normal(size=(OUT_FEATURES, IN_FEATURES)).astype(np.float32)
    values[3] = 0.0
    values[4] = np.abs(values[4])
    return values


def group_of_input(*, act_order: bool) -> Int32:
    """Groups in order, or as `desc_act` leaves them: the inputs of a group scattered over the layer."""
    groups = np.arange(IN_FEATURES, dtype=np.int32) // GROUP_SIZE
    return np.random.default_rng(2).permutation(groups) if act_order else groups


def empty_library_layer(bits: int, *, act_order: bool = False, symmetric: bool = False) -> Any:
    return TorchLinear(
        bits=bits,
        group_size=GROUP_SIZE,
        desc_act=act_order,
        sym=symmetric,
        in_features=IN_FEATURES,
        out_features=OUT_FEATURES,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )


def library_config(bits: int, *, symmetric: bool) -> Any:
    # Its default makes a temporary folder and leaves it to the garbage collector.
    return QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=symmetric, offload_to_disk=False)


def library_packing(bits: int, grid: GptqGrid, g_idx: Int32) -> Any:
    linear = torch.nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False)
    linear.weight.data = torch.from_numpy(weight())
    layer = empty_library_layer(bits)
    steps, zeros = torch.from_numpy(grid.steps.T.copy()), torch.from_numpy(grid.zeros.T.astype(np.float32))
    layer.pack_original(linear, steps, zeros, torch.from_numpy(g_idx))
    return layer


def load_into_library(stored: GptqWeight, *, act_order: bool) -> Any:
    layer = empty_library_layer(stored.bits, act_order=act_order)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(layer, name).copy_(torch.from_numpy(getattr(stored, name)))
    layer.qzero_format(format=1 if stored.convention is V1 else 2)
    if stored.convention is V1:
        convert_gptq_v1_to_v2_format_module(layer, bits=stored.bits, pack_dtype=torch.int32)
    layer.post_init()
    return layer


def stored_weight(bits: int, *, convention: ZeroPointConvention, symmetric: bool, act_order: bool) -> GptqWeight:
    g_idx = group_of_input(act_order=act_order)
    grid = min_max_grid(weight(), g_idx, bits=bits, symmetric=symmetric)
    if convention is V1 and not symmetric:
        # v1 cannot hold a zero point of 0.
        grid = GptqGrid(grid.steps, np.maximum(grid.zeros, 1))
    return pack_gptq(round_to_grid(weight(), grid, g_idx, bits=bits), grid, g_idx, bits=bits, convention=convention)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_min_max_grid_equals_that_of_gptqmodel(bits: int, symmetric: bool) -> None:
    quantizer = Quantizer(library_config(bits, symmetric=symmetric))
    quantizer.configure(perchannel=True)
    grid = min_max_grid(weight(), group_of_input(act_order=False), bits=bits, symmetric=symmetric)
    for group in range(IN_FEATURES // GROUP_SIZE):
        columns = weight()[:, group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
        quantizer.find_params(torch.from_numpy(columns), weight=True)
        assert np.array_equal(grid.steps[group], quantizer.scale.numpy().reshape(-1))
        assert np.array_equal(grid.zeros[group], quantizer.zero.numpy().reshape(-1))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_packed_words_equal_those_of_gptqmodel_bit_for_bit(bits: int, symmetric: bool, act_order: bool) -> None:
    g_idx = group_of_input(act_order=act_order)
    grid = min_max_grid(weight(), g_idx, bits=bits, symmetric=symmetric)
    codes = round_to_grid(weight(), grid, g_idx, bits=bits)
    ours = pack_gptq(codes, grid, g_idx, bits=bits, convention=V2)
    theirs = library_packing(bits, grid, g_idx)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name).numpy()), name


@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_v1_words_equal_those_of_gptqmodel_bit_for_bit(bits: int) -> None:
    new = stored_weight(bits, convention=V2, symmetric=True, act_order=False)
    layer = load_into_library(new, act_order=False)
    convert_gptq_v2_to_v1_format_module(layer, library_config(bits, symmetric=True))
    old = stored_weight(bits, convention=V1, symmetric=True, act_order=False)
    assert np.array_equal(old.qzeros, layer.qzeros.numpy())
    assert not np.array_equal(old.qzeros, new.qzeros)


@pytest.mark.parametrize("convention", [V1, V2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_kernel_of_gptqmodel_reads_our_words_to_the_same_weights(
    bits: int, symmetric: bool, act_order: bool, convention: ZeroPointConvention
) -> None:
    stored = stored_weight(bits, convention=convention, symmetric=symmetric, act_order=act_order)
    layer = load_into_library(stored, act_order=act_order)
    layer.scales = layer.scales.float()
    theirs = layer.dequantize_weight().T.float().numpy()
    ours = dequantize_gptq(stored)
    # An integer below 2^8 times a float16 has at most 8 + 11 significant bits: exact in float32.
    assert np.array_equal(theirs, ours)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_no_decoded_value_is_further_from_the_weight_than_the_bound(
    bits: int, symmetric: bool, act_order: bool
) -> None:
    g_idx = group_of_input(act_order=act_order)
    grid = min_max_grid(weight(), g_idx, bits=bits, symmetric=symmetric)
    decoded = dequantize_gptq(stored_weight(bits, convention=V2, symmetric=symmetric, act_order=act_order))
    error = np.abs(weight() - decoded)
    bound = gptq_error_bound(weight(), grid, g_idx, bits=bits)
    assert (error <= bound).all()
    # Most of it is reached somewhere in each set of codes, so the bound is not idle.
    assert (error / bound).max() > 0.8


@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_wrong_zero_point_convention_shifts_every_weight_by_one_step(bits: int) -> None:
    right = stored_weight(bits, convention=V1, symmetric=True, act_order=False)
    misread = GptqWeight(right.qweight, right.qzeros, right.scales, right.g_idx, bits, V2)
    steps = right.scales.astype(np.float64)[right.g_idx].T
    assert np.array_equal(dequantize_gptq(misread) - dequantize_gptq(right), steps)


def test_codes_survive_packing_for_every_width() -> None:
    for bits in range(1, 9):
        codes = np.random.default_rng(bits).integers(0, 2**bits, size=(3, 64))
        words = pack_bits(codes, bits)
        assert words.shape == (3, 2 * bits)
        assert np.array_equal(unpack_bits(words, bits), codes)
        assert np.array_equal(unpack_bits(words.view(np.int32), bits), codes)


def test_reading_back_gives_the_codes_and_zero_points_that_were_packed() -> None:
    g_idx = group_of_input(act_order=True)
    grid = min_max_grid(weight(), g_idx, bits=4, symmetric=False)
    codes = round_to_grid(weight(), grid, g_idx, bits=4)
    read_codes, read_zeros = gptq_codes(pack_gptq(codes, grid, g_idx, bits=4, convention=V2))
    assert np.array_equal(read_codes, codes)
    assert np.array_equal(read_zeros, grid.zeros)


def test_what_cannot_be_stored_is_refused() -> None:
    g_idx = group_of_input(act_order=False)
    grid = min_max_grid(np.abs(weight()), g_idx, bits=4, symmetric=False)
    codes = round_to_grid(np.abs(weight()), grid, g_idx, bits=4)
    with pytest.raises(ValueError, match="zero point of 0"):
        pack_gptq(codes, grid, g_idx, bits=4, convention=V1)
    with pytest.raises(ValueError, match="5 bits"):
        pack_gptq(codes, grid, g_idx, bits=5, convention=V2)
    with pytest.raises(ValueError, match="do not fit in 3 bits"):
        pack_bits(np.full((1, 32), 8), 3)
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack_bits(np.zeros((1, 10), dtype=np.int64), 3)
