"""Answers to a prompt by a model that is open, as a run shows them before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qlora_hal.contract.checked_trainer import CheckedTrainer
    from qlora_hal.data import ChatTokenizer

SAMPLE_TOKENS = 64
Messages = Sequence[Mapping[str, str]]


def answer(
    trainer: CheckedTrainer,
    tokenizer: ChatTokenizer,
    prompt: str | Messages,
    *,
    adapter: bool,
    max_new_tokens: int = SAMPLE_TOKENS,
) -> str:
    """A greedy answer to a prompt or a conversation; a tokenizer without a chat template continues the plain text."""
    tokens = trainer.generate(
        np.asarray(prompt_tokens(tokenizer, prompt), dtype=np.int32),
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.stop_ids,
        adapter=adapter,
    )
    return tokenizer.decode(tokens.tolist()).strip()


def prompt_tokens(tokenizer: ChatTokenizer, prompt: str | Messages) -> list[int]:
    """What a model is asked: the conversation up to where its answer begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.template is not None:
        return list(tokenizer.encode_chat(messages, add_generation_prompt=True))
    return list(tokenizer.encode("\n".join(message["content"] for message in messages)))
