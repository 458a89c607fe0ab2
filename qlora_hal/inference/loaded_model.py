"""A model that is open and answers: a base, with its adapter where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.data import ChatTokenizer
from qlora_hal.errors import ConfigError
from qlora_hal.run.samples import Messages, answer, room_for_an_answer

ANSWER_TOKENS = 256


@dataclass(slots=True)
class LoadedModel:
    """What `qlora_hal.load` gives, and what metric functions are given during training.

    Answers are greedy, so the same question has the same answer, and there is no seed. `positions` are the model's,
    where known; `has_adapter` is False for a base alone; `plain` tells that the rows of the run were text as it stands,
    without the chat template, so that prompts are, too. Close it, or use it as a context manager: it holds the device.
    One that is `lent`, as to metric functions, goes on when they close it: it is the run's.
    """

    trainer: CheckedTrainer = field(repr=False)
    tokenizer: ChatTokenizer = field(repr=False)
    positions: int | None = None
    has_adapter: bool = True
    plain: bool = False
    lent: bool = False
    is_closed: bool = field(default=False, init=False)

    def generate(
        self, prompt: str | Messages, *, max_new_tokens: int = ANSWER_TOKENS, adapter: bool | None = None
    ) -> str:
        """The answer to a prompt, or to a conversation of `{"role": ..., "content": ...}`; at most `max_new_tokens`
        tokens, and none past the model's positions. `adapter` False asks the base alone.

        Raises ConfigError QH-U19 when the prompt leaves no position, QH-U42 for an adapter that is not there and for a
        model that was closed, DataError QH-D08.
        """
        if self.is_closed:
            raise ConfigError(
                "QH-U42", "This model is closed.", where="generate", fix="Open it again with qlora_hal.load."
            )
        if adapter and not self.has_adapter:
            raise ConfigError(
                "QH-U42",
                "adapter is True, and this model was opened without one.",
                where="adapter",
                fix="Leave it out, or open a run: qlora_hal.load(run_dir).",
            )
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ConfigError(
                "QH-U42",
                f"max_new_tokens is {max_new_tokens!r}; a whole number from 1 on is expected.",
                where="max_new_tokens",
                fix="Give the largest number of tokens that an answer may have.",
            )
        room = room_for_an_answer(self.tokenizer, prompt, self.positions, plain=self.plain)
        max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
        asked = self.has_adapter if adapter is None else adapter
        return answer(
            self.trainer, self.tokenizer, prompt, adapter=asked, max_new_tokens=max_new_tokens, plain=self.plain
        )

    def answer(self, messages: str | Messages, *, max_new_tokens: int = ANSWER_TOKENS) -> tuple[str, str]:
        """(base's answer, adapter's answer). Raises as `generate`."""
        base = self.generate(messages, adapter=False, max_new_tokens=max_new_tokens)
        return base, self.generate(messages, adapter=True, max_new_tokens=max_new_tokens)

    def chat(self, *, system: str | None = None) -> Chat:
        """A conversation that remembers its turns."""
        return Chat(self, [] if system is None else [{"role": "system", "content": system}])

    def close(self) -> None:
        """Give the device back. A closed model answers nothing more."""
        if not self.lent:
            self.is_closed = True
            self.trainer.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class Chat:
    """The turns of a conversation so far, in `messages`."""

    model: LoadedModel = field(repr=False)
    messages: list[Mapping[str, str]] = field(default_factory=list)

    def ask(self, text: str, *, max_new_tokens: int = ANSWER_TOKENS) -> str:
        """The answer to the next turn; both are remembered. Raises as `LoadedModel.generate`, and forgets the turn."""
        asked: Sequence[Mapping[str, str]] = [*self.messages, {"role": "user", "content": text}]
        answered = self.model.generate(asked, max_new_tokens=max_new_tokens)
        self.messages = [*asked, {"role": "assistant", "content": answered}]
        return answered
