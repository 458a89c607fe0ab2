"""Facts come from config.json and headers alone, and name every linear layer that can carry LoRA."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError, UnsafeInputError
from qlora_hal.model.facts import read_facts
from qlora_hal.model.fingerprint import WINDOW_BYTES, WINDOWS, windows
from qlora_hal.model.linear_shapes import left_out_notes
from qlora_hal.model.shape import DecoderShape, decoder_shape

WriteModel = Callable[..., Path]
Tensors = dict[str, np.ndarray]


def half(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def test_llama_facts_from_headers(write_model: WriteModel, llama_weights: Callable[..., Tensors]) -> None:
    facts = read_facts(write_model())
    assert (facts.architecture, facts.model_type) == ("LlamaForCausalLM", "llama")
    assert (facts.vocabulary_size, facts.max_position_embeddings) == (96, 128)
    assert facts.parameter_count == sum(array.size for array in llama_weights().values())
    assert facts.prequantized is None
    assert len(facts.linear_modules) == 14
    assert facts.linear_modules["model.layers.0.mlp.gate_proj"] == LinearShape(32, 48)
    assert facts.linear_modules["model.layers.1.self_attn.k_proj"] == LinearShape(32, 16)
    assert not any("embed" in name or "head" in name or "norm" in name for name in facts.linear_modules)
    assert left_out_notes(facts) == ()
    assert decoder_shape(facts) == DecoderShape(layers=2, hidden=32, feed_forward=48, heads=4, query=32, key_value=16)


def test_shards_give_the_same_facts_as_one_file(write_model: WriteModel) -> None:
    one, three = read_facts(write_model("one")), read_facts(write_model("three", shards=3))
    assert three.linear_modules == one.linear_modules
    assert three.parameter_count == one.parameter_count
    assert {tensor.file for tensor in three.tensors.values()} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_layers_are_listed_in_the_order_of_their_numbers(write_model: WriteModel) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": half(4, 4) for i in (10, 9, 2, 0)}
    modules = list(read_facts(write_model(tensors=tensors)).linear_modules)
    assert modules == [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 9, 10)]


FAMILIES: dict[str, tuple[Tensors, dict[str, object], dict[str, tuple[int, int]], str]] = {
    "phi3 with fused projections": (
        {
            "model.embed_tokens.weight": half(64, 8),
            "lm_head.weight": half(64, 8),
            "model.norm.weight": half(8),
            "model.layers.0.self_attn.qkv_proj.weight": half(24, 8),
            "model.layers.0.self_attn.o_proj.weight": half(8, 8),
            "model.layers.0.mlp.gate_up_proj.weight": half(32, 8),
            "model.layers.0.mlp.down_proj.weight": half(8, 16),
        },
        {"model_type": "phi3", "vocab_size": 64},
        {
            "model.layers.0.self_attn.qkv_proj": LinearShape(8, 24),
            "model.layers.0.self_attn.o_proj": LinearShape(8, 8),
            "model.layers.0.mlp.gate_up_proj": LinearShape(8, 32),
            "model.layers.0.mlp.down_proj": LinearShape(16, 8),
        },
        "",
    ),
    "phi with biases": (
        {
            "model.layers.0.self_attn.dense.weight": half(8, 8),
            "model.layers.0.self_attn.dense.bias": half(8),
            "model.layers.0.mlp.fc1.weight": half(32, 8),
            "model.layers.0.mlp.fc2.weight": half(8, 32),
            "lm_head.weight": half(64, 8),
            "lm_head.bias": half(64),
        },
        {"model_type": "phi", "vocab_size": 64},
        {
            "model.layers.0.self_attn.dense": LinearShape(8, 8),
            "model.layers.0.mlp.fc1": LinearShape(8, 32),
            "model.layers.0.mlp.fc2": LinearShape(32, 8),
        },
        "",
    ),
    "gpt2 with Conv1D": (
        {
            "wte.weight": half(64, 8),
            "wpe.weight": half(16, 8),
            "h.0.attn.c_attn.weight": half(8, 24),
            "h.0.attn.c_proj.weight": half(8, 8),
            "h.0.mlp.c_fc.weight": half(8, 32),
            "h.0.mlp.c_proj.weight": half(32, 8),
        },
        {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16},
        {},
        "4 Conv1D projections (c_attn, c_fc, c_proj) carry no LoRA",
    ),
    "gemma 3 with a vision tower": (
        {
            "language_model.model.embed_tokens.weight": half(64, 8),
            "language_model.model.layers.0.self_attn.q_proj.weight": half(16, 8),
            "language_model.model.layers.0.self_attn.q_norm.weight": half(4),
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": half(16, 8),
            "vision_tower.vision_model.embeddings.patch_embedding.weight": half(8, 3, 2, 2),
            "multi_modal_projector.mm_input_projection_weight": half(8, 8),
        },
        {"model_type": "gemma3", "text_config": {"vocab_size": 64, "max_position_embeddings": 32}},
        {"language_model.model.layers.0.self_attn.q_proj": LinearShape(8, 16)},
        "1 linear layers of towers that see no text (fc1) carry no LoRA",
    ),
    "mixture of experts": (
        {
            "model.layers.0.self_attn.q_proj.weight": half(8, 8),
            "model.layers.0.mlp.gate.weight": half(4, 8),
            "model.layers.0.mlp.experts.0.up_proj.weight": half(16, 8),
            "model.layers.0.mlp.experts.1.up_proj.weight": half(16, 8),
            "model.layers.0.mlp.shared_expert.up_proj.weight": half(16, 8),
        },
        {"model_type": "qwen2_moe", "vocab_size": 64},
        {
            "model.layers.0.self_attn.q_proj": LinearShape(8, 8),
            "model.layers.0.mlp.experts.up_proj": LinearShape(8, 16, experts=2),
            "model.layers.0.mlp.shared_expert.up_proj": LinearShape(8, 16),
        },
        "1 routers (gate) carry no LoRA",
    ),
    "a head under another name": (
        {
            "transformer.out.weight": half(64, 8),
            "output.weight": half(64, 8),
            "transformer.blocks.0.ff.weight": half(8, 8),
        },
        {"model_type": "someone", "vocab_size": 64},
        {"transformer.blocks.0.ff": LinearShape(8, 8)},
        "",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_modules_of_a_family(write_model: WriteModel, family: str) -> None:
    tensors, config, expected, note = FAMILIES[family]
    facts = read_facts(write_model(tensors=tensors, config=config))
    assert facts.linear_modules == expected
    assert note in " ".join(left_out_notes(facts))
    assert facts.vocabulary_size == 64


@pytest.mark.fault("C01")
def test_a_truncated_shard_is_named(write_model: WriteModel) -> None:
    folder = write_model(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors has") as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C01", 5)


@pytest.mark.fault("C04")
def test_a_missing_shard_is_named(write_model: WriteModel) -> None:
    folder = write_model(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors"
    ) as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C79", 5)


@pytest.mark.fault("C04")
def test_an_index_of_another_version_is_refused(write_model: WriteModel) -> None:
    folder = write_model(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.new.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model\.layers\.9\.new\.weight") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C79"


@pytest.mark.fault("X05")
@pytest.mark.fault("C15")
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a\\b.safetensors", ""])
def test_an_index_cannot_name_a_file_outside_the_folder(write_model: WriteModel, name: str) -> None:
    folder = write_model(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeInputError, match="escapes the folder") as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C15", 10)


@pytest.mark.fault("C15")
def test_one_tensor_in_two_shards_is_refused(write_model: WriteModel) -> None:
    folder = write_model(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UnsafeInputError, match="holds too"):
        read_facts(folder)


def test_a_single_file_of_another_name_is_taken_and_several_are_refused(write_model: WriteModel) -> None:
    folder = write_model()
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    assert len(read_facts(folder).linear_modules) == 14
    (folder / "other.safetensors").write_bytes((folder / "gptq_model-4bit-128g.safetensors").read_bytes())
    with pytest.raises(ModelError, match="holds 2 safetensors files") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C71"


def test_an_adapter_folder_is_told_from_a_model(write_model: WriteModel) -> None:
    folder = write_model()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match="is an adapter") as caught:
        read_facts(folder)
    assert "org/base" in caught.value.fix


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_broken_config_is_our_error(write_model: WriteModel, content: str) -> None:
    folder = write_model()
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C70", 5)


# fingerprint --------------------------------------------------------------------------------------------------------
def test_fingerprint_is_of_the_weights_not_of_the_place(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    first, second = read_facts(write_model("a")), read_facts(write_model("b"))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == hashlib.sha256().digest_size * 2


def test_fingerprint_sees_other_weights_of_equal_shape(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    changed = llama_weights()
    changed["model.norm.weight"][3] += 1
    assert read_facts(write_model("a")).fingerprint != read_facts(write_model("b", tensors=changed)).fingerprint
    assert (
        read_facts(write_model("c", tensors=llama_weights(1))).fingerprint != read_facts(write_model("d")).fingerprint
    )


def test_fingerprint_windows_cover_both_ends_and_stay_inside() -> None:
    start, end = 1000, 1000 + 16_000_000_000
    chosen = windows(start, end)
    assert len(chosen) == WINDOWS
    assert chosen[0][0] == start
    assert sum(chosen[-1]) == end
    gaps = {second[0] - first[0] for first, second in itertools.pairwise(chosen)}
    # Evenly spread: the integer division leaves at most one byte between the smallest and the largest gap.
    assert max(gaps) - min(gaps) <= 1
    assert windows(7, 7 + WINDOWS * WINDOW_BYTES) == [(7, WINDOWS * WINDOW_BYTES)]


def test_facts_of_sixteen_gigabytes_take_under_two_seconds(write_model: WriteModel) -> None:
    """Four sparse files of 4 GB: what is timed is what read_facts touches, 4 MiB of each."""
    folder = write_model(shards=2)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    side, weight_map = 46_000, {}
    for number in range(4):
        name, module = f"model-{number}.safetensors", f"model.layers.{number}.mlp.up_proj.weight"
        size = side * side * 2
        header = json.dumps({module: {"dtype": "BF16", "shape": [side, side], "data_offsets": [0, size]}}).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        weight_map[module] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = time.perf_counter()
    facts = read_facts(folder)
    assert time.perf_counter() - started < 2.0
    assert facts.parameter_count == 4 * side * side


def test_gpt2_shape_comes_from_its_own_names(write_model: WriteModel) -> None:
    config: Mapping[str, object] = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    facts = read_facts(write_model(tensors={"h.0.attn.c_attn.weight": half(8, 24)}, config=config))
    assert decoder_shape(facts) == DecoderShape(layers=1, hidden=8, feed_forward=32, heads=2, query=8, key_value=8)
    assert math.prod(facts.tensors["h.0.attn.c_attn.weight"].shape) == facts.parameter_count


@pytest.mark.fault("M50")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 200_000}, r"claims 200000 layers \(num_hidden_layers\); the weights have 2\."),
        ({"num_hidden_layers": 10**30}, "a number of 100 bits layers"),
        ({"n_layer": 257}, r"257 layers \(n_layer\)"),
        ({"text_config": {"num_hidden_layers": 300}}, "300 layers"),
        ({"vision_config": {"depth": 10**8}}, "100000000 layers"),
        ({"layer_types": ["full_attention"] * 300}, r"300 layers \(layer_types\)"),
        ({"hybrid_override_pattern": "M" * 100_000}, "100000 layers"),
        ({"num_labels": 10**6}, "claims 1000000 in num_labels; at most 4096 are read"),
        ({"n_routed_experts": 10**6}, "claims 1000000 in n_routed_experts"),
        ({"text_config": {"num_local_experts": 5000}}, "claims 5000 in num_local_experts"),
    ],
)
def test_layers_that_the_weights_do_not_have_are_refused_before_they_are_built(
    write_model: WriteModel, config: dict[str, object], words: str
) -> None:
    folder = write_model(config={"model_type": "llama", "vocab_size": 96, **config})
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.where) == ("QH-M50", str(folder / "config.json"))


def test_names_of_layers_that_are_not_quantized_are_no_claim_and_deep_models_are_read(write_model: WriteModel) -> None:
    tensors = {f"model.layers.{number}.mlp.up_proj.weight": half(2, 2) for number in range(400)}
    named = {"quantization_config": {"ignored_layers": ["x"] * 5000, "quant_method": "fp8"}}
    read_facts(write_model("deep", tensors=tensors, config={"model_type": "llama", "num_hidden_layers": 400}))
    with pytest.raises(ModelError) as caught:
        read_facts(write_model("quantized", config={"model_type": "llama", **named}))
    assert caught.value.code != "QH-M50"
    many = {f"layers.{number}.weight": half(1, 1) for number in range(3000)}
    with pytest.raises(ModelError, match=r"QH-M50.*the weights have 3000, and at most 2048 are read"):
        read_facts(write_model("many", tensors=many, config={"num_hidden_layers": 3000}))
