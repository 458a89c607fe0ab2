"""Answers to a prompt by a model that is open, as a run shows them before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.data.source.rows import Row
from qlora_hal.data.template.turns import conversation_of, joined
from qlora_hal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qlora_hal.contract.checked_trainer import CheckedTrainer
    from qlora_hal.data import ChatTokenizer

SAMPLE_TOKENS = 64
PLAIN_NOTE = "the rows of this run were text as it stands, without the chat template; prompts are taken so, too"
Messages = Sequence[Mapping[str, str]]


def answer(
    trainer: CheckedTrainer,
    tokenizer: ChatTokenizer,
    prompt: str | Messages,
    *,
    adapter: bool,
    max_new_tokens: int = SAMPLE_TOKENS,
    plain: bool = False,
) -> str:
    """A greedy answer to a prompt or a conversation; `plain`, or without a chat template, the text is continued."""
    tokens = trainer.generate(
        np.asarray(prompt_tokens(tokenizer, prompt, plain=plain), dtype=np.int32),
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.stop_ids,
        adapter=adapter,
    )
    return tokenizer.decode(tokens.tolist()).strip()


def prompt_tokens(tokenizer: ChatTokenizer, prompt: str | Messages, *, plain: bool = False) -> list[int]:
    """What a model is asked: the conversation up to where its answer begins; `plain`, or without a chat template, the
    text opened as a row of text is in training. A conversation is read as those of rows are: other words for who speaks
    are translated. Raises DataError (QH-D03 no conversation, QH-D12 another role, QH-D08) where it is no text, as the
    bytes of another encoding are."""
    asked = {"role": "user", "content": prompt}
    messages = (
        [asked] if isinstance(prompt, str) else conversation_of(Row(1, "prompt", 1, {}), prompt, "prompt").messages
    )
    texts = [str(joined(message.get("content", ""))) for message in messages]
    for text in texts:
        refuse_no_text(text)
    if tokenizer.template is not None and not plain:
        return list(tokenizer.encode_chat(messages, add_generation_prompt=True))
    return [*tokenizer.opening_ids, *tokenizer.encode("\n".join(texts))]


def room_for_an_answer(
    tokenizer: ChatTokenizer,
    prompt: str | Messages,
    positions: int | None,
    *,
    plain: bool = False,
    where: str = "prompt",
) -> int | None:
    """How many of a model's positions a prompt leaves; None where their number is not known. Raises ConfigError QH-U19
    where it leaves none, and as `prompt_tokens`."""
    if positions is None:
        return None
    taken = len(prompt_tokens(tokenizer, prompt, plain=plain))
    if taken >= positions:
        raise ConfigError(
            "QH-U19",
            f"The conversation has {taken} tokens; this model has positions up to {positions}, and an answer needs "
            "some of them.",
            where=where,
            cause="Past its positions a model's answers mean nothing.",
            fix="Shorten the prompt; in a chat, /reset starts over.",
            context={"tokens": taken, "positions": positions},
        )
    return positions - taken


def trained_on_plain_text(run: Mapping[str, object]) -> bool:
    """Whether no training row went through the chat template that the tokenizer has, as run.json tells; False where an
    earlier release did not say."""
    report = run.get("data_report")
    train = report.get("train") if isinstance(report, Mapping) else None
    return isinstance(train, Mapping) and train.get("plain") is True


def refuse_no_text(prompt: str) -> None:
    """Raises DataError QH-D08 for what no tokenizer takes."""
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
