"""What cases are fed: drawn so that no draw makes a case judge rounding."""

from __future__ import annotations

import numpy as np

from qlora_hal_conformance.random_inputs import draw_batch, draw_two_tokens_seen
from qlora_hal_oracle import LlamaShape


def test_two_tokens_that_are_seen_always_differ() -> None:
    shape = LlamaShape(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    random = np.random.default_rng(7)
    plain = [draw_batch(random, shape, lengths=(3,), prompt=2).input_ids[0, :2] for _ in range(200)]
    drawn = [draw_two_tokens_seen(random, shape).input_ids[0, :2] for _ in range(200)]
    assert any(one == other for one, other in plain)
    assert all(one != other for one, other in drawn)
