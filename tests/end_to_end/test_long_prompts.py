"""A prompt and its answer stay within the model's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import model_path
from qlora_hal.errors import ConfigError
from qlora_hal.inference.loaded_model import LoadedModel, prompt_tokens


class Lengths:
    """A trainer that answers with nothing and remembers for how many tokens it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, prompt: Any, *, max_new_tokens: int, stop_tokens: Sequence[int], adapter: bool) -> Any:
        self.asked.append(max_new_tokens)
        return prompt[:0]


def asked_for(words: int, positions: int, max_new_tokens: int) -> list[int]:
    trainer = Lengths()
    pair = LoadedModel(trainer, ChatTokenizer.from_folder(model_path()), positions)  # type: ignore[arg-type]
    pair.answer([{"role": "user", "content": "ls " * words}], max_new_tokens=max_new_tokens)
    return trainer.asked


def test_an_answer_ends_where_the_positions_do() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    taken = len(prompt_tokens(tokenizer, "ls " * 5))
    assert asked_for(5, taken + 3, 64) == [3, 3]
    assert asked_for(5, taken + 64, 64) == [64, 64]


@pytest.mark.fault("U19")
def test_a_prompt_that_leaves_no_position_is_refused_with_both_numbers() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    taken = len(prompt_tokens(tokenizer, "ls " * 50))
    with pytest.raises(ConfigError, match=f"{taken} tokens; this model has positions up to {taken}") as caught:
        asked_for(50, taken, 1)
    assert (caught.value.code, caught.value.exit_status) == ("QH-U19", 2)
