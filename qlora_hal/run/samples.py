"""Answers to a prompt by a model that is open, as a run shows them before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.errors import DataError

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
    """What a model is asked: the conversation up to where its answer begins. Raises DataError (QH-D08) where it is no
    text, as the bytes of another encoding are."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        _refuse_no_text(message["content"])
    if tokenizer.template is not None:
        return list(tokenizer.encode_chat(messages, add_generation_prompt=True))
    return list(tokenizer.encode("\n".join(message["content"] for message in messages)))


def _refuse_no_text(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        # Bytes of a command line or of standard input that are no UTF-8 arrive in this range (PEP 383).
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}, half of a character"
        raise DataError(
            "QH-D08",
            f"The prompt is not UTF-8 text: it holds {found}.",
            where="prompt",
            cause="A tokenizer takes Unicode text alone.",
            fix="Write the prompt in UTF-8.",
        ) from error
