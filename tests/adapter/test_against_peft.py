"""The installed PEFT opens our folders and we open its, tensor for tensor, on a real (tiny) Llama."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qlora_hal.contract.values import LinearShape

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_hal.adapter import check_fits, initial_adapter, module_of, read_adapter, resolve_targets, write_adapter
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.errors import AdapterError

# PEFT 0.21 asks transformers 5 for this property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS = 3


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def base_folder(model: Any, tmp_path: Path) -> str:
    """A base PEFT can look into: on saving it compares vocabularies."""
    model.config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def linear_modules(model: Any) -> dict[str, LinearShape]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    return {name: LinearShape(module.in_features, module.out_features) for name, module in layers}


def trained_adapter(model: Any, targets: str | tuple[str, ...], *, use_rslora: bool = False) -> Adapter:
    modules = linear_modules(model)
    config = AdapterConfig(4, 6.0, 0.1, use_rslora, resolve_targets(targets, modules))
    random = np.random.default_rng(1)
    shapes = initial_adapter(config, modules, seed=0).tensors
    return Adapter({k: random.standard_normal(t.shape, dtype=np.float32) for k, t in shapes.items()}, config)


def peft_modules(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize("knows_all_modules", [True, False])
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ("q_proj", "v_proj"),
        ("model.layers.0.self_attn.q_proj",),
        ("layers.1.mlp.down_proj", "k_proj"),
        r".*layers\.[02]\.self_attn\.(q|o)_proj",
    ],
)
def test_peft_opens_our_folder_with_exactly_these_modules_and_bits(
    tmp_path: Path, targets: str | tuple[str, ...], knows_all_modules: bool
) -> None:
    model = tiny_llama()
    modules = linear_modules(model)
    adapter = trained_adapter(model, targets)
    write_adapter(
        tmp_path / "adapter",
        adapter,
        base_name=base_folder(model, tmp_path),
        base_revision=None,
        provenance={},
        linear_modules=modules if knows_all_modules else None,
    )
    opened = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert peft_modules(opened) == set(adapter.config.target_modules)
    state = peft.get_peft_model_state_dict(opened)
    assert set(state) == set(adapter.tensors)
    assert all(state[key].numpy().tobytes() == tensor.tobytes() for key, tensor in adapter.tensors.items())
    lora = next(module for module in opened.modules() if isinstance(module, peft.tuners.lora.Linear))
    assert lora.scaling["default"] == adapter.config.scale


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "q_proj"], r".*layers\.1\.mlp\..*_proj"])
def test_we_open_what_peft_saves(tmp_path: Path, targets: str | list[str], use_rslora: bool) -> None:
    model = tiny_llama()
    modules = linear_modules(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, use_rslora=use_rslora, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(str(tmp_path))
    found = read_adapter(tmp_path)
    state = peft.get_peft_model_state_dict(wrapped)
    assert set(found.tensors) == set(state)
    assert all(found.tensors[key].tobytes() == tensor.numpy().tobytes() for key, tensor in state.items())
    assert set(found.config.target_modules) == peft_modules(wrapped)
    lora = next(module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.Linear))
    assert found.config.scale == lora.scaling["default"]
    assert (found.config.r, found.config.dropout, found.config.use_rslora) == (4, 0.1, use_rslora)
    check_fits(found, modules, where="a PEFT folder")


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["q_proj"]],
    ids=["adapter-on-the-head", "adapter-on-embeddings", "embeddings-kept-with-it"],
)
def test_what_peft_keeps_of_embeddings_and_heads_is_told_as_its_own(tmp_path: Path, targets: list[str]) -> None:
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(AdapterError, match="unexpected tensors") as refused:
        read_adapter(tmp_path)
    assert refused.value.code == "QH-C09"
    assert "embeddings and heads" in refused.value.cause
    assert refused.value.fix.startswith("Merge the adapter with PEFT")


def test_our_tensors_file_is_the_one_peft_writes(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = trained_adapter(model, ("q_proj",))
    write_adapter(tmp_path / "ours", adapter, base_name=base_folder(model, tmp_path), base_revision=None, provenance={})
    opened = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    opened.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (tmp_path / side / "adapter_model.safetensors" for side in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_setting_of_the_installed_peft_is_known(tmp_path: Path) -> None:
    """A default configuration of this PEFT reads as plain LoRA: no new field is set without us knowing it."""
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_bytes())["peft_type"] == "LORA"
    assert {module_of(key)[0] for key in read_adapter(tmp_path).tensors} == {
        f"model.layers.{n}.self_attn.q_proj" for n in range(LAYERS)
    }


def test_a_bfloat16_adapter_of_peft_becomes_float32_exactly(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.to(torch.bfloat16)
    wrapped.save_pretrained(str(tmp_path))
    for key, tensor in peft.get_peft_model_state_dict(wrapped).items():
        assert np.array_equal(read_adapter(tmp_path).tensors[key], tensor.float().numpy())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r".*layers\.[02]\..*(q|up)_proj", "exclude_modules": r".*\.2\..*"},
    ],
)
def test_the_modules_that_a_configuration_means_are_those_of_peft(fields: dict[str, Any]) -> None:
    from qlora_hal.adapter.peft_targets import PeftTargets

    modules = linear_modules(tiny_llama())
    theirs = peft.LoraConfig(**fields)
    expected = [name for name in modules if not peft.tuners.tuners_utils.check_target_module_exists(theirs, name)]
    assert PeftTargets.read(fields).left_out(modules) == expected
