"""Greedy continuation with a key-value cache."""

from __future__ import annotations

import torch

from qlora_hal.contract.values import Int32
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.transformers_versions import new_cache


def greedy(
    base: BaseModel, prompt: Int32, max_new_tokens: int, stop_tokens: frozenset[int], device: torch.device
) -> list[int]:
    """New tokens after `prompt` `[time]`, up to and without the first stop token."""
    cache = new_cache(base.causal.config)
    step_input = torch.from_numpy(prompt).long().to(device)[None]
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        if base.head is None:
            logits = base.causal(input_ids=step_input, past_key_values=cache, use_cache=True).logits[0, -1]
        else:
            output = base.body(input_ids=step_input, past_key_values=cache, use_cache=True)
            logits = base.head.logits(output.last_hidden_state[0, -1:])[0]
        token = int(logits.argmax(dim=-1))
        if token in stop_tokens:
            break
        generated.append(token)
        step_input = torch.tensor([[token]], device=device)
    return generated
