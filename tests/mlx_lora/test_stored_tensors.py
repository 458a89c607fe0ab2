"""Every stored tensor is used or named, and holds numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_models import FLOAT32, transformers_logits
from safetensors.numpy import load_file, save_file
from tiny_models import edit_config, write_model
from trainers import OpenTrainer, open_cpu_trainer, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal.model.hub import Repository
from qlora_hal.model.hub_model import RemoteWeights
from qlora_hal_backends.mlx_lora.outline import outline
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

Opened = Callable[..., OpenTrainer]
Tensors = dict[str, Any]


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def base_logits(ready: OpenTrainer) -> Any:
    for name, tensor in ready.adapter.tensors.items():
        tensor *= "lora_A" in name  # B = 0
    ready.trainer.attach(ready.adapter)
    return ready.trainer.logits(random_batch(0))


def loaded(folder: Path, weight_format: str = "none") -> MLXLoRATrainer:
    trainer = MLXLoRATrainer()
    size = None if weight_format == "none" else 32
    trainer.load(source_of(folder), Quantization(WeightFormat(weight_format), size), Compute())
    return trainer


# the head -------------------------------------------------------------------------------------------------------------
def with_another_head(tensors: Tensors) -> None:
    head = np.random.default_rng(1).normal(size=tensors["model.embed_tokens.weight"].shape)
    tensors["lm_head.weight"] = head.astype(np.float32)


def with_a_copy_for_a_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("stored", [with_another_head, with_a_copy_for_a_head])
def test_a_stored_head_is_used_whatever_config_json_says_of_ties(
    stored: Callable[[Tensors], None], family: str, tmp_path: Path, opened: Opened
) -> None:
    """As transformers 5 does: tied, unless another head is stored."""
    layers = {"num_hidden_layers": 6} if family == "gemma3_text" else {}
    folder = edit_tensors(write_model(tmp_path, family, tie_word_embeddings=True, **layers), stored)
    expected = transformers_logits(folder, random_batch(0))
    assert np.abs(base_logits(opened(folder)) - expected).max() <= FLOAT32 * np.abs(expected).max()
    with open_cpu_trainer(folder).trainer as cpu:
        assert cpu.linear_modules() == outline(source_of(folder), {}).linear_modules


@pytest.mark.parametrize("family", ["gemma", "cohere"])
def test_another_head_is_refused_where_mlx_lm_always_ties(family: str, tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, family, tie_word_embeddings=True)
    same = edit_tensors(Path(shutil.copytree(folder, tmp_path / "same")), with_a_copy_for_a_head)
    assert np.array_equal(base_logits(opened(same)), base_logits(opened(folder)))
    with pytest.raises(ModelError, match=r"lm_head\.weight") as caught:
        outline(source_of(edit_tensors(folder, with_another_head)), {})
    assert caught.value.code == "QH-M50"


# tensors without a place ----------------------------------------------------------------------------------------------
def test_a_tensor_that_mlx_lm_drops_is_refused_by_name(tmp_path: Path) -> None:
    """ERNIE's experts are chosen with a correction that mlx-lm takes away."""
    with pytest.raises(ModelError, match=r"e_score_correction_bias") as caught:
        outline(source_of(write_model(tmp_path, "ernie4_5_moe")), {})
    assert caught.value.code == "QH-M50"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.gate.weight", "model.layers.7.mlp.up_proj.weight", "scale"])
def test_a_tensor_that_no_module_has_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = edit_tensors(
        write_model(tmp_path, "llama"), lambda tensors: tensors.update({name: np.ones((4, 4), np.float32)})
    )
    with pytest.raises(ModelError, match=name) as caught:
        outline(source_of(folder), {})
    assert caught.value.code == "QH-M50"


def test_layers_that_predict_further_tokens_are_left_out_and_told(tmp_path: Path, opened: Opened) -> None:
    """Of DeepSeek-V3; transformers leaves them out as well. Stacked experts are no reason to think them used."""
    folder = write_model(tmp_path, "deepseek_v3")
    expected = base_logits(opened(folder))
    edit_tensors(folder, lambda t: t.update({"model.layers.61.eh_proj.weight": np.ones((4, 4), np.float32)}))
    assert any(
        "1 tensors of layers that predict further tokens" in note for note in outline(source_of(folder), {}).notes
    )
    assert np.array_equal(base_logits(opened(folder)), expected)


def test_frequencies_and_masks_of_older_checkpoints_are_recomputed(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "gpt_neox")
    expected = base_logits(opened(folder))
    buffers = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
        "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    edit_tensors(folder, lambda tensors: tensors.update(buffers))
    assert np.array_equal(base_logits(opened(folder)), expected)


# numbers --------------------------------------------------------------------------------------------------------------
@pytest.mark.fault("M52")
@pytest.mark.parametrize(
    ("family", "name", "value", "weight_format"),
    [
        ("llama", "model.embed_tokens.weight", np.nan, "int4_affine"),
        ("llama", "model.layers.1.input_layernorm.weight", np.nan, "none"),
        ("llama", "lm_head.weight", np.inf, "none"),
        ("llama", "model.layers.1.self_attn.v_proj.weight", -np.inf, "none"),
        ("llama", "model.layers.1.self_attn.v_proj.weight", np.nan, "int4_affine"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias", np.inf, "int4_affine"),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.down_proj.weight", np.nan, "none"),
    ],
)
def test_what_is_not_finite_is_refused_with_its_name(
    family: str, name: str, value: float, weight_format: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, family)

    def spoil(tensors: Tensors) -> None:
        tensors[name].flat[3] = value

    edit_tensors(folder, spoil)
    # The experts of a layer are one tensor in mlx-lm.
    expected = "mlp.*down_proj" if "experts" in name else name.removesuffix(".weight")
    with pytest.raises(ModelError, match=expected) as caught:
        loaded(folder, weight_format)
    assert caught.value.code == "QH-M52"


@pytest.mark.fault("M52")
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_of_a_packed_weight_that_are_not_finite_are_refused(part: str, tmp_path: Path) -> None:
    import mlx.core as mx

    folder = write_model(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj"

    def pack(tensors: Tensors) -> None:
        for module in [key.removesuffix(".weight") for key in tensors if "_proj" in key]:
            packed, scales, biases = mx.quantize(mx.array(tensors[f"{module}.weight"]), group_size=32, bits=4)
            tensors[f"{module}.weight"] = np.array(packed)
            tensors[f"{module}.scales"], tensors[f"{module}.biases"] = np.array(scales), np.array(biases)
        tensors[f"{name}.{part}"].flat[0] = np.nan

    edit_tensors(folder, pack)
    edit_config(folder, quantization={"group_size": 32, "bits": 4})
    with pytest.raises(ModelError, match=name) as caught:
        loaded(folder, "int4_affine")
    assert caught.value.code == "QH-M52"


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.int16])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_whole_numbers_in_place_of_a_weight_are_refused_with_its_name(name: str, dtype: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    edit_tensors(folder, lambda tensors: tensors.update({name: (3 * tensors[name]).astype(dtype)}))
    with pytest.raises(ModelError, match=rf"{name} is stored as \w+; a floating-point number is expected") as caught:
        outline(source_of(folder), {})
    assert caught.value.code == "QH-M50"


# linear layers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {"use_qk_norm": True}),  # norms of two dimensions
        ("deepseek_v3", {}),  # a projection that mlx-lm splits by head
        ("qwen3_moe", {}),
        ("gpt_neox", {}),
    ],
)
def test_the_linear_layers_that_are_told_are_those_of_the_loaded_model(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_model(tmp_path, family, **changes)
    told = outline(source_of(folder), {})
    with loaded(folder) as trainer:
        assert told.linear_modules == trainer.linear_modules()
    assert not any("norm" in name for name in told.linear_modules)


def test_linear_layers_that_mlx_lm_has_no_layer_for_are_named(tmp_path: Path) -> None:
    notes = outline(source_of(write_model(tmp_path, "deepseek_v3")), {}).notes
    assert any(note.startswith("2 linear layers (kv_b_proj) carry no LoRA with mlx-lm") for note in notes)


def with_a_quantized_head(folder: Path, **how: object) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = write_model(folder / "plain", "llama")
    settings = BitsAndBytesConfig(llm_int8_skip_modules=["nothing"], **how)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def test_a_head_that_bitsandbytes_quantized_is_called_what_it_is(tmp_path: Path) -> None:
    folder = with_a_quantized_head(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ModelError, match="lm_head is quantized in this checkpoint") as caught:
        outline(source_of(folder), {})
    assert caught.value.code == "QH-C72"


# weights that lie on the hub -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("change", [None, with_a_copy_for_a_head], ids=["as written", "a copy for a head"])
def test_outline_is_the_same_before_the_weights_are_fetched(
    tmp_path: Path, family: str, change: Callable[[Tensors], object] | None
) -> None:
    folder = write_model(tmp_path / "here", family, **({} if change is None else {"tie_word_embeddings": True}))
    here = source_of(folder if change is None else edit_tensors(folder, change))
    described = tmp_path / "described"
    described.mkdir()
    shutil.copyfile(here.path / "config.json", described / "config.json")
    files = RemoteWeights(Repository("org/tiny", None, "0" * 40, {}), ("model.safetensors",))
    there = replace(here, path=described, remote=files)
    assert outline(there, {}) == outline(here, {})
