"""The linear layers told from headers are those that the model library really builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_hal.contract.values import LinearShape
from qlora_hal.model.facts import read_facts
from qlora_hal.model.shape import decoder_shape

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_name_the_linear_layers_of_the_real_model(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    model.save_pretrained(tmp_path)
    built = {
        name: LinearShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    facts = read_facts(tmp_path)
    assert facts.linear_modules == built
    assert facts.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.vocabulary_size, facts.max_position_embeddings) == (160, 128)
    shape = decoder_shape(facts)
    assert (shape.layers, shape.hidden, shape.feed_forward, shape.heads) == (2, 64, 96, 4)
