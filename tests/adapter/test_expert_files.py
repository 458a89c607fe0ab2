"""Adapters on stacks of experts in files: as they are read again, and as the real PEFT opens them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_hal.adapter import initial_adapter, read_adapter, resolve_targets, write_adapter
from qlora_hal.adapter.peft_experts import layout_of
from qlora_hal.adapter.targets import require_no_dropout_on_experts
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.errors import AdapterError, ConfigError, UnsupportedFeatureError
from qlora_hal.model.facts import read_facts

IDS = torch.arange(24).reshape(2, 12)


def drawn_model(folder: Path, model_type: str) -> Any:
    from drawn_models import write_drawn_model

    return by_the_loop(write_drawn_model(folder, model_type))


def by_the_loop(model: Any) -> Any:
    """Experts one after the other: transformers' grouped products call what torch 2.8 has not on a CPU."""
    model.set_experts_implementation("eager")
    return model


def drawn_adapter(folder: Path, seed: int = 0, targets: Any = "all-linear", **settings: Any) -> Adapter:
    """An adapter whose B is drawn as well."""
    modules = read_facts(folder).linear_modules
    config = AdapterConfig(4, 6.0, target_modules=resolve_targets(targets, modules), **settings)
    adapter = initial_adapter(config, modules, seed)
    generator = np.random.default_rng(seed)
    drawn = {
        name: generator.normal(0, 0.2, tensor.shape).astype(np.float32) if ".lora_B." in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    return replace(adapter, tensors=drawn)


def written(folder: Path, adapter: Adapter, linear_modules: Any = None, provenance: Any = None) -> Path:
    write_adapter(
        folder,
        adapter,
        base_name="base",
        base_revision=None,
        provenance=provenance or {},
        linear_modules=linear_modules,
    )
    return folder


# peft 0.21 looks for the patterns among modules alone, and says that it found none.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_opens_it_with_the_logits_of_the_merged_weights(model_type: str, use_rslora: bool, tmp_path: Path) -> None:
    """The weights W + scale B A, added in float64 to the files' tensors, and loaded by transformers."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = drawn_model(tmp_path / "base", model_type)
    plain = model(IDS).logits
    adapter = drawn_adapter(tmp_path / "base", use_rslora=use_rslora)
    linear_modules = read_facts(tmp_path / "base").linear_modules
    folder = written(tmp_path / "adapter", adapter, linear_modules)

    merged = load_file(tmp_path / "base" / "model.safetensors")
    pairs = load_file(folder / "adapter_model.safetensors")
    for name, a in pairs.items():
        if name.endswith(".lora_A.weight"):
            b = pairs[name.replace("lora_A", "lora_B")].double()
            weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            added = merged[weight].double() + adapter.config.scale * (b @ a.double())
            merged[weight] = added.to(merged[weight].dtype)
    (tmp_path / "merged").mkdir()
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "merged" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    expected = by_the_loop(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())(IDS).logits

    found = PeftModel.from_pretrained(model, folder)(IDS).logits
    moved = (expected - plain).abs().max()
    assert (found - expected).abs().max() < 1e-4 * moved, "the sums are made in another order, in float32"
    assert moved > 0.1


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "granitemoe"])
def test_a_stack_is_read_as_it_was_written(model_type: str, tmp_path: Path) -> None:
    drawn_model(tmp_path / "base", model_type)
    adapter = drawn_adapter(tmp_path / "base")
    provenance = {"experts_in_files": layout_of(model_type)}
    for number, linear_modules in enumerate((None, read_facts(tmp_path / "base").linear_modules)):
        found = read_adapter(written(tmp_path / f"adapter{number}", adapter, linear_modules, provenance))
        assert found.config == adapter.config
        assert found.tensors.keys() == adapter.tensors.keys()
        assert all(np.array_equal(found.tensors[name], tensor) for name, tensor in adapter.tensors.items())


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("rank_pattern", {r".*\.gate_up_proj": 4}, "QH-C51"),
        ("alpha_pattern", {r".*\.gate_up_proj": 6}, "QH-C51"),
        ("target_parameters", ["experts.gate_up_proj"], "QH-C09"),
    ],
)
def test_a_configuration_of_another_meaning_is_refused(field: str, value: Any, code: str, tmp_path: Path) -> None:
    drawn_model(tmp_path / "base", "qwen3_moe")
    folder = written(tmp_path / "adapter", drawn_adapter(tmp_path / "base"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterError) as refusal:
        read_adapter(folder)
    assert refusal.value.code == code


def test_a_stack_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    drawn_model(tmp_path / "base", "qwen3_moe")
    folder = written(tmp_path / "adapter", drawn_adapter(tmp_path / "base"))
    (folder / "qlora_hal.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="3 experts, with numbers up to 3") as refusal:
        read_adapter(folder)
    assert refusal.value.code == "QH-C09"


@pytest.mark.fault("U22")
@pytest.mark.parametrize(
    ("named", "fix"), [(("w1", "w2"), "w3"), (("w1", "w3"), "w2"), (("w3",), "w1 and w2"), (("w2",), "")]
)
def test_what_peft_opens_only_together_is_adapted_together(named: tuple[str, ...], fix: str, tmp_path: Path) -> None:
    drawn_model(tmp_path, "mixtral")
    modules = read_facts(tmp_path).linear_modules
    if not fix:
        assert len(resolve_targets(named, modules)) == 2
        return
    with pytest.raises(ConfigError) as refusal:
        resolve_targets(named, modules)
    assert (refusal.value.code, refusal.value.fix) == ("QH-U22", f"Add {fix} to target_modules.")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_opens_an_adapter_on_the_last_projection_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    model = drawn_model(tmp_path / "base", "mixtral")
    plain = model(IDS).logits
    adapter = drawn_adapter(tmp_path / "base", targets=("w2",))
    found = PeftModel.from_pretrained(model, written(tmp_path / "adapter", adapter))(IDS).logits
    assert (found - plain).abs().max() > 0.01


@pytest.mark.fault("U23")
def test_shared_experts_that_a_model_lacks_are_refused(tmp_path: Path) -> None:
    drawn_model(tmp_path, "qwen3_moe")
    modules = read_facts(tmp_path).linear_modules
    with pytest.raises(ConfigError, match="has no shared experts") as refusal:
        resolve_targets("all-linear", modules, "shared")
    assert refusal.value.code == "QH-U23"


@pytest.mark.fault("U24")
def test_dropout_on_stacked_experts_is_refused(tmp_path: Path) -> None:
    drawn_model(tmp_path, "qwen3_moe")
    modules = read_facts(tmp_path).linear_modules
    stacks = [modules[path] for path in resolve_targets("all-linear", modules)]
    with pytest.raises(UnsupportedFeatureError, match="6 of the target modules are stacks") as refusal:
        require_no_dropout_on_experts(0.1, stacks)
    assert refusal.value.code == "QH-U24"
    require_no_dropout_on_experts(0.0, stacks)
    require_no_dropout_on_experts(0.1, [modules[path] for path in resolve_targets("all-linear", modules, "none")])


def test_which_experts_carry_an_adapter(tmp_path: Path) -> None:
    drawn_model(tmp_path, "qwen2_moe")
    modules = read_facts(tmp_path).linear_modules
    leaves = {
        choice: {path.partition(".mlp.")[2] for path in resolve_targets("all-linear", modules, choice)} - {""}
        for choice in ("all", "shared", "none")
    }
    projections = ("gate_proj", "up_proj", "down_proj")
    shared = {f"shared_expert.{name}" for name in projections}
    assert leaves == {"all": shared | {f"experts.{name}" for name in projections}, "shared": shared, "none": set()}
    with pytest.raises(ConfigError, match=r"lora\.experts is none"):
        resolve_targets(("gate_proj", "up_proj"), modules, "none")
