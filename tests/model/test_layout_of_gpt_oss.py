"""What of a published gpt-oss is read, from its headers, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_mxfp4 import write_published_gpt_oss
from safetensors.torch import load_file, save_file
from trainers import open_cpu_trainer, source_of

from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal.memory.estimate import weight_bytes
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import plan_model
from qlora_hal_backends.torch_family.outline import outline

Tensors = dict[str, torch.Tensor]
BLOCK = "model.layers.1.mlp.experts"


def changed(folder: Path, change: Callable[[Tensors], object] = lambda _: None, **config: Any) -> Path:
    """The published model with other tensors or another config.json."""
    write_published_gpt_oss(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    return folder


def test_headers_tell_shapes_and_format(tmp_path: Path) -> None:
    facts = read_facts(changed(tmp_path))
    assert facts.prequantized is not None
    assert (facts.prequantized.weight_format, facts.prequantized.block_size) == ("mxfp4", 32)
    stacks = {name: shape.weight for name, shape in facts.linear_modules.items() if shape.experts > 1}
    assert stacks == {
        f"model.layers.{layer}.mlp.experts.{name}": sides
        for layer in range(2)
        for name, sides in (("gate_proj", (4, 96, 64)), ("up_proj", (4, 96, 64)), ("down_proj", (4, 64, 96)))
    }
    experts = 2 * 4 * 3 * 64 * 96
    packed = experts // 2 + experts // 32
    rest = facts.parameter_count - experts
    assert weight_bytes(facts, WeightFormat.MXFP4, 32, False, "bfloat16") == packed + 2 * rest


def test_config_json_alone_tells_the_same(tmp_path: Path) -> None:
    """But for the fingerprint, which is of contents."""
    whole = read_facts(changed(tmp_path / "whole"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    planned = plan_model(str(alone), revision=None, trust_remote_code=False, config_is_enough=True).facts
    assert {name: (one.dtype, one.shape) for name, one in planned.tensors.items()} == {
        name: (one.dtype, one.shape) for name, one in whole.tensors.items()
    }
    assert planned.linear_modules == whole.linear_modules
    assert planned.parameter_count == whole.parameter_count


GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32, "vocab_size": 201088,
    "attention_bias": True, "tie_word_embeddings": False, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


@pytest.mark.parametrize(("layers", "experts", "gigabytes"), [(24, 32, 13.76), (36, 128, 65.25)])
def test_published_sizes_follow_from_config_json(layers: int, experts: int, gigabytes: float, tmp_path: Path) -> None:
    """gpt-oss-20b and -120b: the `total_size` of their indices on the hub."""
    config = {**GPT_OSS_20B, "num_hidden_layers": layers, "num_local_experts": experts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = plan_model(str(tmp_path), revision=None, trust_remote_code=False, config_is_enough=True).facts
    assert weight_bytes(facts, WeightFormat.MXFP4, 32, False, "bfloat16") / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def _drop_scales(tensors: Tensors) -> None:
    del tensors[f"{BLOCK}.down_proj_scales"]


def _drop_blocks(tensors: Tensors) -> None:
    del tensors[f"{BLOCK}.down_proj_blocks"]


def _shorten_scales(tensors: Tensors) -> None:
    tensors[f"{BLOCK}.down_proj_scales"] = tensors[f"{BLOCK}.down_proj_scales"][:, :-1].contiguous()


def _store_twice(tensors: Tensors) -> None:
    tensors[f"{BLOCK}.down_proj"] = torch.zeros(4, 96, 64, dtype=torch.bfloat16)


def _wrong_dtype(tensors: Tensors) -> None:
    tensors[f"{BLOCK}.down_proj_scales"] = tensors[f"{BLOCK}.down_proj_scales"].to(torch.int8)


@pytest.mark.fault("C73")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_scales, "down_proj_scales is missing"),
        (_drop_blocks, "has none"),
        (_shorten_scales, "are due"),
        (_store_twice, "stored twice"),
        (_wrong_dtype, "stored as I8"),
    ],
)
def test_bytes_that_contradict_each_other_are_refused(
    change: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        read_facts(changed(tmp_path, change))
    assert refusal.value.code == "QH-C73"


def _flatten_blocks(tensors: Tensors) -> None:
    name = f"{BLOCK}.down_proj_blocks"
    tensors[name] = tensors[name].flatten(2)


def _unpack_all(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(("_blocks", "_scales"))]:
        del tensors[name]


def _pack_attention(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj_blocks"] = torch.zeros(64, 2, 16, dtype=torch.uint8)


@pytest.mark.fault("C72")
@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (_flatten_blocks, {}, r"of shape \[4, 64, 48\]"),
        (_unpack_all, {}, "no tensor of it ends in _blocks"),
        (_pack_attention, {}, "of no routed experts"),
        (lambda _: None, {"model_type": "qwen3_moe"}, "model_type 'qwen3_moe', whose layout is not known"),
    ],
)
def test_a_layout_that_is_not_known_is_named(
    change: Callable[[Tensors], object], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        read_facts(changed(tmp_path, change, **config))
    assert refusal.value.code == "QH-C72"


@pytest.mark.fault("M50")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_local_experts": 5}, r"has 4 experts; by config\.json \(num_local_experts\) there are 5"),
        ({"intermediate_size": 128}, "config.json asks for"),
        ({"num_hidden_layers": 3}, "tensors missing"),
    ],
)
def test_a_config_of_another_model_is_refused_before_data_are_read(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    types = {"layer_types": ["sliding_attention"] * int(config.get("num_hidden_layers", 2))}
    with pytest.raises(ModelError, match=words) as refusal:
        outline(source_of(changed(tmp_path, **config, **types)), {})
    assert refusal.value.code == "QH-M50"


@pytest.mark.fault("M52")
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{BLOCK}.gate_up_proj_scales"][2, 5, 1] = 255

    with pytest.raises(ModelError, match="gate_up_proj holds NaN or infinity") as refusal:
        open_cpu_trainer(changed(tmp_path, spoil), weight_format="mxfp4")
    assert refusal.value.code == "QH-M52"
