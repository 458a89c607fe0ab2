"""Keys and values by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.memory.inference import inference_memory, kv_cache_bytes
from qlora_hal.model.described_weights import described_header
from qlora_hal.model.facts import ModelFacts, read_facts
from tests.memory.configs import write_config


@pytest.fixture
def llama_8b(tmp_path: Path) -> ModelFacts:
    config = write_config(tmp_path, hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256)
    return read_facts(tmp_path, [described_header(config, tmp_path)])


def test_keys_and_values_are_2_x_layers_x_key_heads_x_head_size_x_length_x_bytes(llama_8b: ModelFacts) -> None:
    # 2 x 32 x 8 x 128 x 2 = 131,072 bytes a token: 1 GiB for 8192 tokens.
    assert kv_cache_bytes(llama_8b, 1, 8192, "bfloat16") == 2**30
    assert kv_cache_bytes(llama_8b, 3, 8192, "float32") == 6 * 2**30


def test_answering_takes_weights_cache_and_runtime(llama_8b: ModelFacts) -> None:
    found = inference_memory(llama_8b, Quantization(WeightFormat.NONE), "bfloat16", 1, 8192, 5)
    assert found.weights == 2 * llama_8b.parameter_count
    assert found.total == found.weights + 2**30 + 5


HEADS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, **HEADS}
GEMMA = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 8}
LATENTS = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: list[tuple[str, dict[str, object], bool]] = [
    ("llama", {}, False),
    ("qwen3", {"head_dim": 16}, False),
    ("mistral", {"sliding_window": 8}, True),
    ("phi3", {"sliding_window": 8, "pad_token_id": 0}, True),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, True),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **EXPERTS}, True),
    ("gemma2", {"sliding_window": 8, "head_dim": 16}, True),
    ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "num_hidden_layers": 7}, True),
    ("gemma3n_text", {"sliding_window": 8, **GEMMA, "num_kv_shared_layers": 2}, False),
    ("cohere2", {"sliding_window": 8, "pad_token_id": 0}, True),
    ("gpt_oss", {"sliding_window": 8, "head_dim": 8, **EXPERTS}, True),
    ("deepseek_v2", LATENTS, False),
    ("deepseek_v3", LATENTS, False),
    ("qwen3_next", {**EXPERTS, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2}, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes", "may_be_left_out"), FAMILIES, ids=[one[0] for one in FAMILIES])
def test_the_cache_is_what_transformers_keeps(
    family: str, changes: dict[str, object], may_be_left_out: bool, tmp_path: Path
) -> None:
    """Of each kind of attention; also where config.json leaves `layer_types` to the family's defaults."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kept = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.arange(20)[None] % 96, past_key_values=kept, use_cache=True)
    tensors = [getattr(layer, name, None) for layer in kept.layers for name in ("keys", "values")]
    expected = sum(one.numel() * 4 for one in tensors if one is not None)
    model.save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    assert expected == kv_cache_bytes(facts, 1, 20, "float32")
    if may_be_left_out:
        shorter = {name: value for name, value in facts.config.items() if name != "layer_types"}
        assert expected == kv_cache_bytes(replace(facts, config=shorter), 1, 20, "float32")
