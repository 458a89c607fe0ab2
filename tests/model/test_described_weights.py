"""What config.json says of the weights, held against transformers' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.errors import ModelError
from qlora_hal.model.described_weights import (
    DESCRIBED_FAMILIES,
    agreed_header,
    described_shapes,
    why_not_described,
)
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import plan_model

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0,
}  # fmt: skip
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}, {"tie_word_embeddings": True}],
    "mistral": [{}, {"head_dim": 32}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{}, {"attention_bias": True, "head_dim": 16}],
    "gemma": [{}, {"head_dim": 32}],
    "gemma2": [{}, {"head_dim": 32, "attention_bias": True}],
    "gemma3_text": [{"head_dim": 32}],
    "phi3": [{}, {"tie_word_embeddings": True}],
    "granite": [{}, {"attention_bias": True, "mlp_bias": True}],
    "olmo2": [{}, {"attention_bias": True}],
    "smollm3": [{}, {"attention_bias": True, "mlp_bias": True}],
    "cohere": [{}, {"use_qk_norm": True}],
    "gpt_oss": [{"num_local_experts": 4}, {"num_local_experts": 4, "attention_bias": False, "head_dim": 16}],
    "glm4": [{}, {"attention_bias": True, "head_dim": 32}],
}


@pytest.mark.parametrize(
    ("family", "changes"), [(family, changes) for family, variants in VARIANTS.items() for changes in variants]
)
def test_described_tensors_are_those_of_the_architecture(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    stored = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    written = json.loads((tmp_path / "config.json").read_text())
    assert why_not_described(written) == ""
    assert described_shapes(written) == stored


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_described_experts_hold_what_the_architecture_computes_with(family: str) -> None:
    """transformers joins the experts of a block while loading, so names differ and the number of weights does not."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    of_qwen = {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **SIZES, num_local_experts=4, **of_qwen)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = described_shapes(config.to_dict() | {"model_type": family})
    count_of_all = sum(parameter.numel() for parameter in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count_of_all
    assert sum(".experts." in name for name in shapes) == 2 * 4 * 3


def test_every_family_is_held_against_the_architecture() -> None:
    assert set(VARIANTS) | {"mixtral", "qwen3_moe"} == DESCRIBED_FAMILIES


def test_facts_of_a_config_alone_are_those_of_the_headers(write_model: Any, tmp_path: Path) -> None:
    whole = write_model("whole", config=None)
    alone = tmp_path / "alone"
    alone.mkdir()
    config = json.loads((whole / "config.json").read_text()) | {"dtype": "float16"}
    (alone / "config.json").write_text(json.dumps(config))
    planned = plan_model(str(alone), revision=None, trust_remote_code=False, tokenizer=False, config_is_enough=True)
    known = read_facts(whole)
    assert planned.facts.linear_modules == known.linear_modules
    assert planned.facts.parameter_count == known.parameter_count
    assert (planned.facts.read_from, known.read_from) == ("config.json alone", "the headers of the weight files")
    assert {name: (t.dtype, t.shape, t.byte_count) for name, t in planned.facts.tensors.items()} == {
        name: (t.dtype, t.shape, t.byte_count) for name, t in known.tensors.items()
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "the tensors of model_type 'mamba' do not follow from it here"),
        ({"num_hidden_layers": 10**9}, "it has no usable num_hidden_layers"),
        ({"hidden_size": "64"}, "it has no usable hidden_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "which layers are packed stands in the weight files alone"),
        ({"dtype": "float8_e4m3fn"}, "its dtype is 'float8_e4m3fn'"),
    ],
)
@pytest.mark.fault("C71")
def test_config_that_does_not_say_it_all_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **changes}))
    with pytest.raises(ModelError) as refused:
        plan_model(str(tmp_path), revision=None, trust_remote_code=False, tokenizer=False, config_is_enough=True)
    assert refused.value.code == "QH-C71"
    assert reason in refused.value.message + refused.value.cause


def test_run_needs_weights_that_an_estimate_does_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        plan_model(str(tmp_path), revision=None, trust_remote_code=False)


def test_sizes_and_names_of_the_files_are_held_against_the_description(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES, "dtype": "bfloat16"}
    shapes = described_shapes(config)
    count = sum(a * (b[0] if b else 1) for a, *b in shapes.values())
    names = dict.fromkeys(shapes, "model.safetensors")
    for width in (2, 4):  # as config.json says, or in float32 all the same
        agreed = agreed_header(config, tmp_path, names, [width * count + 3000])
        assert agreed is not None
        assert sum(tensor.byte_count for tensor in agreed.tensors.values()) == width * count
    assert agreed_header(config, tmp_path, names, [2 * count - 1]) is None, "a tensor less"
    assert agreed_header(config, tmp_path, names, [2 * count + 20_000]) is None, "tensors more"
    assert agreed_header(config, tmp_path, {**names, "model.rotary": "x"}, [2 * count + 3000]) is None, "another name"
