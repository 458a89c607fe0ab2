"""What the MLX trainer does with a window: masks, recomputation, dropout keys, formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import write_model
from trainers import OpenTrainer, largest_difference, packed, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal_backends.mlx_lora.capabilities import MLX_FORMATS
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

# Two float32 programs of the same products in another order: see test_architectures.
FLOAT32 = 8 * 2048**0.5 * 2**-24

Opened = Callable[..., OpenTrainer]


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_packed_samples_have_the_gradients_of_separate_rows(family: str, tmp_path: Path, opened: Opened) -> None:
    """Mistral's window of 8 tokens is kept within each sample."""
    trainer = opened(write_model(tmp_path, family)).trainer
    batches = [random_batch(1, rows=2, time=9), random_batch(2, rows=1, time=14)]
    one, other = dict(trainer.gradients([packed(batches)])), dict(trainer.gradients(batches))
    assert largest_difference(one, other) <= FLOAT32


def test_packing_is_refused_where_a_layer_is_no_attention(llama: Path, opened: Opened) -> None:
    """A layer that asks for no keys and values would carry its state from one sample into the next."""

    class NoAttention:
        use_sliding = False

        def __call__(self, x: mx.array, mask: object, cache: object) -> mx.array:
            return x

    trainer = opened(llama).trainer
    trainer._base.causal.model.layers[1] = NoAttention()  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedFeatureError, match="Packing is not possible") as caught:
        trainer.gradients([packed([random_batch(1)])])
    assert caught.value.code == "QH-B60"


@pytest.mark.long
@pytest.mark.parametrize("compile", ["off", "auto"])
def test_recomputed_layers_give_the_same_gradients_with_the_same_dropout_masks(
    compile: str, llama: Path, opened: Opened
) -> None:
    """Bit for bit: the recomputation draws its masks from the same key."""
    window, moments = [random_batch(3), random_batch(4, time=12)], []
    for checkpointing in (False, True):
        ready = opened(llama, weight_format="int4_affine", block_size=32, checkpointing=checkpointing, dropout=0.3,
                       compile=compile)  # fmt: skip
        ready.step(window, 0.0, dropout_key=11, beta1=0.0, max_grad_norm=None)
        moments.append(dict(ready.trainer.export_optimizer().moments))
    assert largest_difference(*moments) <= FLOAT32


def test_checkpointing_patches_no_class(llama: Path, opened: Opened) -> None:
    from mlx_lm.models.llama import TransformerBlock

    before = TransformerBlock.__call__
    opened(llama, checkpointing=True).step([random_batch(5)])
    assert TransformerBlock.__call__ is before


def test_checkpointing_saves_memory(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "llama", num_hidden_layers=8)
    batch, peaks = random_batch(6, rows=4, time=64), []
    for checkpointing in (False, True):
        ready = opened(folder, checkpointing=checkpointing)
        mx.reset_peak_memory()
        ready.step([batch])
        peaks.append(ready.trainer.peak_memory_bytes())
    assert peaks[1] < 0.7 * peaks[0]  # 8 layers kept, or 8 inputs and one layer


def test_micro_batches_do_not_add_up_in_memory(llama: Path, opened: Opened) -> None:
    """Each micro-batch is handed to the device before the next: its activations are gone by then."""
    ready, batch = opened(llama), random_batch(6, rows=4, time=64)
    peaks = []
    for count in (1, 6):
        mx.reset_peak_memory()
        ready.step([batch] * count)
        peaks.append(ready.trainer.peak_memory_bytes())
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("weight_format", [WeightFormat.NONE, WeightFormat.NF4, *MLX_FORMATS], ids=str)
def test_products_use_the_weights_that_are_shown(weight_format: WeightFormat, llama: Path, opened: Opened) -> None:
    """Logits equal those of an unquantized model that holds the decoded weights."""
    size = 64 if weight_format is WeightFormat.NF4 else None
    size = MLX_FORMATS[weight_format].group_sizes[0] if weight_format in MLX_FORMATS else size
    ready = opened(llama, weight_format=weight_format.value, block_size=size)
    plain = opened(llama)
    for name, linear in plain.trainer._base.linears.items():  # type: ignore[attr-defined]
        linear.base.weight = mx.array(ready.trainer.dequantized_weight(name))
    batch = random_batch(7)
    found, expected = ready.trainer.logits(batch), plain.trainer.logits(batch)
    assert np.abs(found - expected).max() <= FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 64, 3), ("mxfp4", 32, 4)])
def test_a_model_that_mlx_lm_converted_gives_mlx_lms_logits(
    mode: str, group_size: int, bits: int, llama: Path, tmp_path: Path, opened: Opened
) -> None:
    """Its embedding and head are packed too, and are taken as they are."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(llama)
    model, config = quantize_model(model, config, group_size, bits, mode=mode)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    weight_format = f"int{bits}_affine" if mode == "affine" else mode
    ready = opened(tmp_path, weight_format=weight_format, block_size=group_size)
    for name, tensor in ready.adapter.tensors.items():
        tensor *= "lora_A" in name
    ready.trainer.attach(ready.adapter)
    batch = random_batch(8)
    expected = np.array(model(mx.array(batch.input_ids)))
    assert np.abs(ready.trainer.logits(batch) - expected).max() <= FLOAT32 * np.abs(expected).max()
    assert ready.step([batch]).applied


def test_the_16_bit_model_never_stands_whole_in_memory(tmp_path: Path) -> None:
    """Loading into 4 bits peaks far below the float32 checkpoint."""
    folder = write_model(tmp_path, "llama", num_hidden_layers=40, hidden_size=128, intermediate_size=256)
    source = source_of(folder)
    stored = sum(tensor.byte_count for tensor in source.facts.tensors.values())
    with MLXLoRATrainer() as trainer:
        trainer.load(source, Quantization(WeightFormat.INT4_AFFINE, 64), Compute())
        # 5 of 32 bits stay, and embedding and head; MLX's queue on a CPU is ten deep, so that the first trial product
        # holds ten decoded weights of 128 KiB, each twice.
        assert trainer.peak_memory_bytes() < 0.4 * stored


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weight_format", ["int4_affine", "mxfp8"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    value: float, weight_format: str, llama: Path, tmp_path: Path, opened: Opened
) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ModelError, match=name) as caught:
        opened(tmp_path, weight_format=weight_format, block_size=32)
    assert caught.value.code == "QH-M52"


def test_rows_that_groups_do_not_divide_are_refused_with_the_way_out(llama: Path, opened: Opened) -> None:
    with pytest.raises(ModelError, match="groups of 128 do not divide") as caught:
        opened(llama, weight_format="int4_affine", block_size=128)
    assert caught.value.code == "QH-M53"
    assert "block_size" in str(caught.value.fix)


def test_a_dropout_key_decides_everything(llama: Path, opened: Opened) -> None:
    """Two trainers, other steps before: the same key, the same bits."""
    window = [random_batch(9)]
    ready, used = (opened(llama, dropout=0.3) for _ in range(2))
    used.step([random_batch(1, time=7)], 0.0, dropout_key=3)
    settings = {"dropout_key": 2**62 + 5, "beta1": 0.0, "max_grad_norm": None}
    first, second = (each.step(window, 0.0, **settings).grad_norm for each in (ready, used))
    other = ready.step(window, 0.0, **(settings | {"dropout_key": 6})).grad_norm
    assert first == second != other


def test_generation_equals_mlx_lms_own(llama: Path, opened: Opened) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    prompt = random_batch(2, rows=1, time=6).input_ids[0]
    model, _ = load_model(llama)
    steps = zip(generate_step(mx.array(prompt), model, max_tokens=10), range(10), strict=False)
    expected = [int(token) for (token, _), _ in steps]
    found = opened(llama).trainer.generate(prompt, max_new_tokens=10, adapter=False)
    assert found.tolist() == expected


def test_files_are_read_whatever_their_names(llama: Path, tmp_path: Path, opened: Opened) -> None:
    """A hub's cache holds blobs without an ending, reached through links."""
    blob = tmp_path / "blobs" / "abc123"
    blob.parent.mkdir()
    blob.write_bytes((llama / "model.safetensors").read_bytes())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_text((llama / "config.json").read_text())
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "llama"
    assert opened(snapshot).step([random_batch(3)]).applied
