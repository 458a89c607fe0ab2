"""Keys and values by hand."""

from __future__ import annotations

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
