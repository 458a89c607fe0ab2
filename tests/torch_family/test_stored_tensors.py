"""Every stored tensor is used or named, and none that is not finite is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_models import write_drawn_model
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_model
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import OpenTrainer, open_cpu_trainer, random_batch, source_of

from qlora_hal.errors import ModelError
from qlora_hal_backends.torch_family.loading import finite
from qlora_hal_backends.torch_family.outline import outline

Opened = Callable[..., OpenTrainer]
Change = Callable[[dict[str, torch.Tensor]], object]


def rewritten(folder: Path, change: Change) -> Path:
    """The folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def base_logits(trainer: OpenTrainer) -> np.ndarray:
    for name, tensor in trainer.adapter.tensors.items():
        tensor *= "lora_A" in name
    trainer.trainer.attach(trainer.adapter)
    return trainer.trainer.logits(random_batch(0))


def transformers_logits(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(random_batch(0).input_ids).long()).logits.numpy()


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama"])
def test_another_head_beside_tied_embeddings_is_used_as_by_transformers_and_named(
    family: str, tmp_path: Path, opened: Opened
) -> None:
    folder = write_model(tmp_path, family, tie_word_embeddings=True)
    rewritten(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 0.5 + 1})
    )
    trainer = opened(folder)
    (note,) = trainer.trainer.load_notes
    assert note.startswith("config.json ties lm_head.weight to model.embed_tokens.weight, but other numbers are stored")
    expected = transformers_logits(folder)
    assert np.abs(base_logits(trainer) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_tied_head_that_is_stored_twice_is_one_tensor(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "qwen2", tie_word_embeddings=True)
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    trainer = opened(folder)
    causal = trainer.trainer._base.causal  # type: ignore[attr-defined]
    assert causal.lm_head.weight is causal.model.embed_tokens.weight
    assert trainer.trainer.load_notes == ()


def test_only_the_head_of_a_tied_pair_may_be_stored(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "qwen2", tie_word_embeddings=True)
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    expected = transformers_logits(folder)
    assert np.abs(base_logits(opened(folder)) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_tensors_that_the_architecture_computes_are_named_when_they_are_stored(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "llama")
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewritten(folder, lambda tensors: tensors.update({name.format(n): torch.ones(8) for n in (0, 1)}))
    (note,) = opened(folder).trainer.load_notes
    assert note.startswith(f"2 stored tensors are not used ({name.format(0)}, {name.format(1)})")


@pytest.mark.fault("M50")
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.bias", "model.layers.0.self_attn.q_norm.weight", "lm_head.bias"]
)
def test_a_tensor_that_the_architecture_would_not_use_is_refused(name: str, tmp_path: Path) -> None:
    """A bias that config.json does not ask for: transformers passes it over, and nobody hears of it."""
    folder = rewritten(write_model(tmp_path, "llama"), lambda tensors: tensors.update({name: torch.ones(8)}))
    with pytest.raises(ModelError, match=f"1 left over \\({name}\\)") as refusal:
        outline(source_of(folder), {})
    assert refusal.value.code == "QH-M50"


@pytest.mark.fault("M50")
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"])
def test_a_tensor_that_is_missing_is_refused_before_weights_are_read(name: str, tmp_path: Path) -> None:
    folder = rewritten(write_model(tmp_path, "qwen2", tie_word_embeddings=False), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"1 tensors missing \\({name}\\)"):
        outline(source_of(folder), {})


# buffers --------------------------------------------------------------------------------------------------------------
def test_a_table_that_the_architecture_computes_is_not_taken_from_the_file(tmp_path: Path, opened: Opened) -> None:
    """transformers does not read it either, whatever it holds."""
    folder = write_model(tmp_path, "llama")
    rewritten(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.linspace(1.0, 0.1, 8)}))
    trainer = opened(folder)
    expected = transformers_logits(folder)
    assert np.abs(base_logits(trainer) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert any("model.rotary_emb.inv_freq" in note for note in trainer.trainer.load_notes)


LAYER_SCALAR = "model.layers.0.layer_scalar"


@pytest.fixture
def gemma4(tmp_path: Path) -> Path:
    """Its layers are multiplied by a stored buffer, that is no parameter."""
    write_drawn_model(tmp_path, "gemma4_text")
    return tmp_path


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt_bigcode"])
def test_tables_of_a_hostile_size_are_not_computed(model_type: str, tmp_path: Path) -> None:
    """A causal mask of 10^5 x 10^5 in each layer: minutes and ten gigabytes."""
    write_drawn_model(tmp_path, model_type)
    key = "n_positions" if model_type == "gpt_bigcode" else "max_position_embeddings"
    edit_config(tmp_path, **{key: 100_000})
    with pytest.raises(ModelError, match="would compute tables of") as refusal:
        outline(source_of(tmp_path), {})
    assert refusal.value.code == "QH-M51"


@pytest.mark.fault("M50")
def test_a_stored_buffer_that_is_missing_or_misshapen_is_refused(gemma4: Path) -> None:
    rewritten(gemma4, lambda tensors: tensors.update({LAYER_SCALAR: torch.ones(64)}))
    with pytest.raises(ModelError, match=rf"{LAYER_SCALAR} has shape \[64\]"):
        outline(source_of(gemma4), {})
    rewritten(gemma4, lambda tensors: tensors.pop(LAYER_SCALAR))
    with pytest.raises(ModelError, match=rf"1 tensors missing \({LAYER_SCALAR}\)"):
        outline(source_of(gemma4), {})


@pytest.mark.fault("M52")
def test_a_buffer_that_is_not_finite_is_named(gemma4: Path) -> None:
    rewritten(gemma4, lambda tensors: tensors[LAYER_SCALAR].fill_(float("nan")))
    with pytest.raises(ModelError, match=f"{LAYER_SCALAR} holds NaN or infinity"):
        open_cpu_trainer(gemma4)


@pytest.mark.fault("M50")
def test_two_stored_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    rewritten(folder, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}))
    with pytest.raises(ModelError, match=r"are both stored for model\.norm\.weight"):
        outline(source_of(folder), {})


@pytest.mark.fault("M52")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen2", tie_word_embeddings=False)
    rewritten(folder, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinity") as refusal:
        open_cpu_trainer(folder, weight_format="nf4")
    assert refusal.value.code == "QH-M52"


@pytest.mark.fault("M52")
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_number_that_the_compute_dtype_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    """It is finite as it is stored: 3.4e38 is more than bfloat16 holds."""
    folder = rewritten(write_model(tmp_path, "llama"), lambda tensors: tensors[name].view(-1)[3].fill_(3.4e38))
    with pytest.raises(ModelError, match=rf"{name} holds 3.4e\+38; bfloat16 ends at 3.39e\+38") as refusal:
        open_cpu_trainer(folder, dtype="bfloat16")
    assert refusal.value.code == "QH-M52"


@pytest.mark.fault("M52")
@pytest.mark.parametrize("part", ["SCB", "weight.absmax"])
def test_a_scale_of_a_quantized_layer_that_is_not_finite_is_named(part: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    write_model(tmp_path / "plain", "llama")
    is_int8 = part == "SCB"
    settings = BitsAndBytesConfig(
        load_in_8bit=is_int8, load_in_4bit=not is_int8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantized")
    name = f"model.layers.0.mlp.up_proj.{part}"
    rewritten(tmp_path / "quantized", lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    with pytest.raises(ModelError, match=f"{name} holds NaN") as refusal:
        open_cpu_trainer(tmp_path / "quantized", weight_format="int8" if is_int8 else "nf4")
    assert refusal.value.code == "QH-M52"


def described(folder: Path, **description: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **description}))


@pytest.mark.parametrize(
    ("description", "told"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "load_in_8bit: true"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "load_in_4bit: true"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "bits: 4"),
    ],
)
def test_a_described_quantization_that_the_weights_do_not_have_is_said(
    description: dict[str, object], told: str, tmp_path: Path
) -> None:
    from qlora_hal.contract.backend import Quantization
    from qlora_hal.contract.capabilities import WeightFormat
    from qlora_hal.detect.requirements import unmet_description_note

    folder = write_model(tmp_path, "llama")
    assert unmet_description_note(source_of(folder).facts, Quantization(WeightFormat.NF4)) == ""
    described(folder, **description)
    note = unmet_description_note(source_of(folder).facts, Quantization(WeightFormat.NF4))
    assert told in note
    assert "they are stored as nf4, as quantization.weight_format says" in note


# dtypes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.int16])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_whole_numbers_in_place_of_a_weight_are_refused_with_its_name(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, "llama")
    rewritten(folder, lambda tensors: tensors.update({name: (3 * tensors[name]).to(dtype)}))
    with pytest.raises(ModelError, match=rf"{name} is stored as \w+; a floating-point number is expected") as caught:
        outline(source_of(folder), {})
    assert caught.value.code == "QH-M50"


def with_a_quantized_head(folder: Path, **how: object) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = write_model(folder / "plain", "llama")
    settings = BitsAndBytesConfig(llm_int8_skip_modules=["nothing"], **how)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("how", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantized_head_is_called_what_it_is(how: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lm_head is quantized in this checkpoint") as caught:
        outline(source_of(with_a_quantized_head(tmp_path, **how)), {})
    assert caught.value.code == "QH-C72"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_look_for_what_is_not_finite_takes_no_room_of_the_tensors_size(dtype: torch.dtype) -> None:
    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            made = [each.numel() for each in pytree.tree_leaves(found) if isinstance(each, torch.Tensor)]
            self.made = max(self.made, *made, 0)
            return found

    sound = torch.linspace(-2.0, 2.0, 4096).to(dtype)
    with Largest() as room:
        assert finite(sound, "name", "folder") is sound
    assert 0 < room.made <= 2
    for worse in (float("nan"), float("inf"), -float("inf")):
        damaged = sound.clone()
        damaged[1234] = worse
        with pytest.raises(ModelError, match="QH-M52"):
            finite(damaged, "name", "folder")
