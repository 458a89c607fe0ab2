"""Greedy continuation with a key-value cache."""

from __future__ import annotations

import mlx.core as mx

from qlora_hal.contract.values import Int32
from qlora_hal_backends.mlx_lora.loading import BaseModel


def greedy(base: BaseModel, prompt: Int32, max_new_tokens: int, stop_tokens: frozenset[int]) -> list[int]:
    """New tokens after `prompt` `[time]`, up to and without the first stop token. Raises UnsupportedFeatureError QH-B61
    beyond a sliding window that mlx-lm leaves out."""
    from mlx_lm.models.cache import make_prompt_cache

    base.window.check_generation(len(prompt) + max_new_tokens)
    cache = make_prompt_cache(base.causal)
    step_input = mx.array(prompt)[None]
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        token = int(base.causal(step_input, cache=cache)[0, -1].argmax().item())
        if token in stop_tokens:
            break
        generated.append(token)
        step_input = mx.array([[token]])
    return generated
