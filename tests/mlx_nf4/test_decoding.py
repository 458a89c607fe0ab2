"""Checkpoints of bitsandbytes are read and decoded to its values, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import qlora_hal.demo
from qlora_hal.errors import ModelError
from qlora_hal_backends.mlx_lora.nf4 import quantize_nf4
from qlora_hal_backends.mlx_lora.nf4_bitsandbytes import read_weight
from tests.mlx_nf4.bitsandbytes_nf4 import DTYPES, Array, bits, decoded, gaussian, quantized, saved

pytestmark = pytest.mark.usefixtures("no_compiler")

STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def json_bytes(**changes: object) -> Array:
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 96], **changes}
    return np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_weights_decode_to_the_values_of_bitsandbytes(dtype: str, block_size: int, nested: bool) -> None:
    weight = gaussian(2560, 4096, dtype)
    theirs = decoded(*quantized(weight, block_size, nested=nested))
    ours = read_weight(saved(weight, block_size, nested=nested), "layer")
    assert np.array_equal(bits(ours.dequantize(DTYPES[dtype][1])), bits(theirs))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(10, 96), (63, 65), (4, 4), (130, 4097)])
def test_blocks_across_rows_short_blocks_and_odd_counts_decode_alike(shape: tuple[int, int], nested: bool) -> None:
    for dtype, (_, mlx_dtype) in DTYPES.items():
        weight = gaussian(*shape, dtype)
        theirs = decoded(*quantized(weight, 64, nested=nested))
        ours = read_weight(saved(weight, 64, nested=nested), "layer")
        assert np.array_equal(bits(ours.dequantize(mlx_dtype)), bits(theirs))


def test_every_linear_weight_of_the_demo_model_decodes_as_in_bitsandbytes() -> None:
    file = Path(qlora_hal.demo.__file__).parent / "model" / "model.safetensors"
    tensors = {name: tensor for name, tensor in mx.load(str(file)).items() if name.endswith("_proj.weight")}
    assert len(tensors) == 6 * 7
    for name, tensor in tensors.items():
        for dtype, (torch_dtype, mlx_dtype) in DTYPES.items():
            weight = tensor.astype(mlx_dtype)
            packed, state = quantized(_as_torch(weight).to(torch_dtype), 64)
            ours = quantize_nf4(weight)
            assert np.array_equal(np.array(ours.packed), packed.numpy().reshape(-1)), (name, dtype)
            assert np.array_equal(bits(ours.dequantize(mlx_dtype)), bits(decoded(packed, state))), (name, dtype)


def _as_torch(weight: mx.array) -> object:
    import torch

    return torch.from_numpy(np.array(weight.astype(mx.float32)))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_saved_file_reads_alike_through_mlx_and_through_numpy(tmp_path: Path, nested: bool) -> None:
    tensors = saved(gaussian(64, 128), 64, nested=nested, prefix="a.b")
    save_file(tensors, tmp_path / "weights.safetensors")
    from_file = read_weight(mx.load(str(tmp_path / "weights.safetensors")), "a.b")
    from_numpy = read_weight(tensors, "a.b")
    assert from_file.shape == from_numpy.shape == (64, 128)
    for ours, other in zip(from_file.arrays, from_numpy.arrays, strict=True):
        assert np.array_equal(np.array(ours), np.array(other))


def test_packed_bytes_stored_in_another_dtype_are_the_same_bytes() -> None:
    tensors = saved(gaussian(64, 128), 64)
    as_floats = {**tensors, "layer.weight": tensors["layer.weight"].reshape(-1).view(np.float32)}
    as_bfloat16 = {**tensors, "layer.weight": mx.array(tensors["layer.weight"]).reshape(-1).view(mx.bfloat16)}
    expected = bits(read_weight(tensors, "layer").dequantize(mx.float32))
    for stored in (as_floats, as_bfloat16):
        assert np.array_equal(bits(read_weight(stored, "layer").dequantize(mx.float32)), expected)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"layer.weight": np.zeros((383, 1), np.uint8)}, "383 entries"),
        ({"layer.weight.absmax": np.ones(11, np.float32)}, "11 entries"),
        ({"layer.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, "not the table of NF4"),
        ({STATE: np.frombuffer(b"{not json", dtype=np.uint8)}, "not the JSON"),
        ({STATE: json_bytes(quant_type="fp4")}, "does not describe NF4"),
        ({STATE: json_bytes(shape=[96])}, "its shape is"),
        ({STATE: json_bytes(shape=[8, True])}, "its shape is"),
        ({STATE: json_bytes(blocksize=48)}, "blocks of 48"),
        ({STATE: json_bytes(nested_blocksize=256)}, "layer.weight.absmax has 48 entries"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(changed: dict[str, Array], problem: str) -> None:
    tensors = {**saved(gaussian(8, 96), 64), **changed}
    with pytest.raises(ModelError, match=problem) as refusal:
        read_weight(tensors, "layer")
    assert refusal.value.code == "QH-C73"


def test_a_missing_part_is_refused_by_name() -> None:
    tensors = saved(gaussian(64, 128), 64, nested=True)
    for part in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != part}
        with pytest.raises(ModelError, match=f"{part} is missing"):
            read_weight(rest, "layer")


@pytest.mark.parametrize("offset", [None, True, "1", float("nan"), 1e300])
def test_an_offset_that_is_no_finite_float32_is_refused(offset: object) -> None:
    tensors = saved(gaussian(64, 128), 64, nested=True)
    state = json.loads(tensors[STATE].tobytes())
    tensors[STATE] = np.frombuffer(json.dumps({**state, "nested_offset": offset}).encode(), dtype=np.uint8)
    with pytest.raises(ModelError, match="its nested_offset is") as refusal:
        read_weight(tensors, "layer")
    assert refusal.value.code == "QH-C73"


@pytest.mark.fault("M52")
def test_scales_that_are_not_finite_are_refused() -> None:
    tensors = saved(gaussian(8, 96), 64)
    tensors["layer.weight.absmax"] = np.full(12, np.nan, np.float32)
    with pytest.raises(ModelError, match=r"layer.weight.absmax holds NaN or infinity") as refusal:
        read_weight(tensors, "layer")
    assert refusal.value.code == "QH-M52"
