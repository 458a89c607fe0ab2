"""Greedy continuation with a key-value cache."""

from __future__ import annotations

import torch

from qlora_hal.contract.values import Int32
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.transformers_versions import cache_argument, new_cache


def greedy(
    base: BaseModel, prompt: Int32, max_new_tokens: int, stop_tokens: frozenset[int], device: torch.device
) -> list[int]:
    """New tokens after `prompt` `[time]`, up to and without the first stop token."""
    model = base.causal if base.head is None else base.body
    cached = {cache_argument(model): new_cache(base.causal.config), "use_cache": True}
    step_input = torch.from_numpy(prompt).long().to(device)[None]
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        if base.head is None:
            logits = model(input_ids=step_input, **cached).logits[0, -1]
        else:
            output = model(input_ids=step_input, **cached)
            logits = base.head.logits(output.last_hidden_state[0, -1:])[0]
        token = int(logits.argmax(dim=-1))
        if token in stop_tokens:
            break
        generated.append(token)
        step_input = torch.tensor([[token]], device=device)
    return generated
