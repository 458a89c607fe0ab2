"""A converted adapter does in the other tool what it did in the first: logits of real PEFT against real mlx-lm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tiny_models import edit_config, write_model

from qlora_hal.adapter import read_adapter
from qlora_hal.export.converting import SAME_NAMES, convert_adapter
from qlora_hal.model.source import ModelSource, resolve_model
from tests.adapter_mlx.both_tools import (
    TOKENS,
    Float64,
    logits_in_mlx,
    random_adapter,
    rounding_bound,
    save_for_peft,
    train_in_mlx,
)

pytestmark = [
    # PEFT 0.21 asks transformers 5 for this property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# What mlx-lm reads elsewhere in config.json than transformers 5 writes it, or computes in one way only.
SHAPES: dict[str, dict[str, Any]] = {"gemma3_text": {"num_hidden_layers": 6}, "gemma": {"hidden_act": "gelu_python"}}
EDITS: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_theta": 10000.0},
    "phi": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def source_of(base: Path) -> ModelSource:
    return resolve_model(str(base), revision=None, trust_remote_code=False)


def assert_same_effect(base: Path, in_peft: Path, in_mlx: Path) -> None:
    """Both tools within rounding of the exact logits, which are far from the base's."""
    exact, bound = rounding_bound(base, in_peft)
    found: Float64 = logits_in_mlx(base, in_mlx)
    assert np.abs(found - exact).max() <= bound
    assert np.abs(logits_in_mlx(base, None) - exact).max() > 1000 * bound


@pytest.mark.parametrize("family", sorted(SAME_NAMES))
def test_an_adapter_of_peft_acts_alike_in_mlx_lm_in_every_family(tmp_path: Path, family: str) -> None:
    base = write_model(tmp_path / "base", family, **SHAPES.get(family, {}))
    edit_config(base, **EDITS.get(family, {}))
    peft = save_for_peft(tmp_path / "peft", random_adapter(base), base)
    convert_adapter(peft, tmp_path / "mlx", to="mlx", model=source_of(base))
    assert_same_effect(base, peft, tmp_path / "mlx")


@pytest.mark.parametrize("with_model", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    ("targets", "choices"),
    [
        ("all-linear", {"use_rslora": True}),
        ("all-linear", {"r": 5, "alpha": 7.5}),
        (("q_proj", "down_proj"), {}),
        (("layers.2.self_attn.v_proj", "layers.2.mlp.up_proj"), {}),
        (("layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"), {}),
        (("layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"), {"use_rslora": True}),
    ],
    ids=["rslora", "odd rank", "some modules", "last layer", "scattered modules", "last layers, rslora"],
)
def test_scale_and_places_survive_the_way_to_mlx_lm(
    tmp_path: Path, llama: Path, targets: str | tuple[str, ...], choices: dict[str, Any], with_model: bool
) -> None:
    peft = save_for_peft(tmp_path / "peft", random_adapter(llama, targets, **choices), llama)
    convert_adapter(peft, tmp_path / "mlx", to="mlx", model=source_of(llama) if with_model else None)
    assert_same_effect(llama, peft, tmp_path / "mlx")


@pytest.mark.parametrize("with_model", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    ("num_layers", "more"),
    [
        (3, {}),
        (1, {}),
        (2, {"keys": ["self_attn.q_proj", "mlp.gate_proj"]}),
        (-1, {"keys": ["self_attn.o_proj"], "rank": 8, "scale": 20.0}),
        (1, {"keys": ["model.layers.0.self_attn.q_proj", "self_attn.k_proj"]}),
    ],
    ids=["all layers", "last layer", "some modules", "defaults", "one module by its path"],
)
def test_an_adapter_of_mlx_lm_acts_alike_in_peft(
    tmp_path: Path, llama: Path, num_layers: int, more: dict[str, Any], with_model: bool
) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=num_layers, **more)
    convert_adapter(trained, tmp_path / "peft", to="peft", model=source_of(llama) if with_model else None)
    assert_same_effect(llama, tmp_path / "peft", trained)


def test_the_last_sixteen_layers_stay_the_last_sixteen(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", num_hidden_layers=18)
    trained = train_in_mlx(base, tmp_path / "mlx", num_layers=16, keys=["self_attn.q_proj", "mlp.down_proj"])
    done = convert_adapter(trained, tmp_path / "peft", to="peft", model=source_of(base))
    assert any("covers 16 of 18 layers, 2-17; layers 0-1 have none" in note for note in done.notes)
    assert {int(module.split(".")[2]) for module in read_adapter(tmp_path / "peft").config.target_modules} == {
        *range(2, 18)
    }
    assert_same_effect(base, tmp_path / "peft", trained)


def test_mlx_lm_itself_loads_the_adapter_beside_its_model(tmp_path: Path, talking_llama: Path) -> None:
    peft = save_for_peft(tmp_path / "peft", random_adapter(talking_llama), talking_llama)
    convert_adapter(peft, tmp_path / "mlx", to="mlx", model=source_of(talking_llama))
    model, _ = mlx_lm.load(str(talking_llama), adapter_path=str(tmp_path / "mlx"))
    exact, bound = rounding_bound(talking_llama, peft)
    assert np.abs(np.array(model(mx.array(TOKENS))) - exact).max() <= bound


def test_mlx_lm_generates_with_the_adapter_as_peft_does(tmp_path: Path, talking_llama: Path) -> None:
    peft = save_for_peft(tmp_path / "peft", random_adapter(talking_llama), talking_llama)
    convert_adapter(peft, tmp_path / "mlx", to="mlx", model=source_of(talking_llama))
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(talking_llama), "--prompt", "the sea"]
    command += ["--ignore-chat-template", "--max-tokens", "6", "--temp", "0", "--verbose", "False"]
    command += ["--adapter-path", str(tmp_path / "mlx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == greedy_in_peft(talking_llama, peft, "the sea", 6)
    assert done.stdout.strip() != greedy_in_peft(talking_llama, None, "the sea", 6)


def greedy_in_peft(base: Path, adapter: Path | None, prompt: str, count: int) -> str:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    model: Any = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(tokens[0, -count:])).strip()
