"""Generation that is right for a short prompt of ordinary tokens, one stop token and few new ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, Batch, Int32
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

from .registry import Mutant, with_trainer

LONGEST = 512
BLOCK = 64
END, FIRST_ORDINARY = 2, 3
NOTHING: Int32 = np.zeros(0, np.int32)


class LastTokensOfThePrompt(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(
            prompt[-LONGEST:], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter
        )


class FirstTokensOfThePrompt(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(
            prompt[:LONGEST], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter
        )


class FirstStopTokenHeeded(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(
            prompt, max_new_tokens=max_new_tokens, stop_tokens=tuple(stop_tokens)[:1], adapter=adapter
        )


class LastStopTokenHeeded(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(
            prompt, max_new_tokens=max_new_tokens, stop_tokens=tuple(stop_tokens)[-1:], adapter=adapter
        )


class EndedByThePrompt(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        if set(prompt.tolist()) & set(stop_tokens):
            return NOTHING
        return super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)


class PromptCutAtItsEndToken(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        ends = np.flatnonzero(prompt == END)
        read = prompt[: max(int(ends[0]), 1)] if len(ends) else prompt
        return super().generate(read, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)


class SpecialTokensLeftOut(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        ordinary = prompt[prompt >= FIRST_ORDINARY]
        return super().generate(ordinary, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)


class DropoutInGeneration(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        if not self.attached.adapter.config.dropout or not adapter:
            return super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + max_new_tokens:
            batch = _row(tokens)
            masks = self._masks_of(len(tokens))(batch)
            token = int(self.attached.model.forward(batch, self.arithmetic, masks).logits[0, -1].argmax())
            if token in stop_tokens:
                break
            tokens.append(token)
        return np.array(tokens[len(prompt) :], np.int32)


class CacheOfOneBlock(ReferenceTrainer):
    """After 64 new tokens the cache is full: what comes later is not kept in it."""

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + max_new_tokens:
            places = [*range(min(len(prompt) + BLOCK, len(tokens) - 1)), len(tokens) - 1]
            batch = _row([tokens[place] for place in places], places)
            token = int(self.logits_of(batch, adapter=adapter)[0, -1].argmax())
            if token in stop_tokens:
                break
            tokens.append(token)
        return np.array(tokens[len(prompt) :], np.int32)


def _row(tokens: Sequence[int], places: Sequence[int] | None = None) -> Batch:
    row = np.array([tokens], np.int32)
    positions = np.array([places or range(len(tokens))], np.int32)
    return Batch(row, np.full_like(row, IGNORE_LABEL), positions, np.ones_like(row), np.zeros(1, np.int32))


_ROOM = ("80",)
MUTANTS = (
    Mutant(
        "last_512_tokens_of_the_prompt",
        "Answers the last 512 tokens of a prompt.",
        _ROOM,
        with_trainer(LastTokensOfThePrompt),
    ),
    Mutant(
        "first_512_tokens_of_the_prompt",
        "Answers the first 512 tokens of a prompt.",
        _ROOM,
        with_trainer(FirstTokensOfThePrompt),
    ),
    Mutant(
        "first_stop_token_heeded",
        "Heeds the first of several stop tokens.",
        _ROOM,
        with_trainer(FirstStopTokenHeeded),
    ),
    Mutant(
        "last_stop_token_heeded",
        "Heeds the last of several stop tokens.",
        _ROOM,
        with_trainer(LastStopTokenHeeded),
    ),
    Mutant(
        "ended_by_the_prompt",
        "Gives nothing where the prompt holds a stop token.",
        _ROOM,
        with_trainer(EndedByThePrompt),
    ),
    Mutant(
        "prompt_cut_at_its_end_token",
        "Reads a prompt up to its first end token.",
        _ROOM,
        with_trainer(PromptCutAtItsEndToken),
    ),
    Mutant(
        "special_tokens_left_out",
        "Leaves pad, bos and eos out of a prompt.",
        _ROOM,
        with_trainer(SpecialTokensLeftOut),
    ),
    Mutant(
        "dropout_in_generation",
        "Drops adapter inputs while it generates.",
        _ROOM,
        with_trainer(DropoutInGeneration),
    ),
    Mutant(
        "cache_of_64_new_tokens",
        "Keeps no more than 64 new tokens in its cache.",
        _ROOM,
        with_trainer(CacheOfOneBlock),
    ),
)
