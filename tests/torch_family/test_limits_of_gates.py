"""gpt-oss's gates stop where config.json says, whatever version of transformers builds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_hal_backends.torch_family.transformers_versions import build_causal

gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")


def test_a_limit_written_into_the_code_gives_way_to_that_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.17 has it."""
    from transformers import GptOssConfig

    built = gpt_oss.GptOssExperts.__init__

    def with_seven(experts: Any, config: Any) -> None:
        built(experts, config)
        experts.limit = 7.0

    monkeypatch.setattr(gpt_oss.GptOssExperts, "__init__", with_seven)
    config = GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=64, swiglu_limit=0.75,
    )  # fmt: skip
    causal = build_causal(config, dtype=torch.float32, attention="eager", trust_remote_code=False)
    assert [layer.mlp.experts.limit for layer in causal.model.layers] == [0.75, 0.75]
