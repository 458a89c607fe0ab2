"""L4: greedy continuation, judged on the backend's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Batch, Int32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_greedy
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import attentive, draw_adapter, draw_batch, draw_window, with_zero
from qlora_hal_conformance.tolerances import Bound
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN

pytestmark = pytest.mark.needs(Feature.GENERATE)

NEW_TOKENS = 12
MANY_NEW_TOKENS = 100
"""Well past a block of a cache, which are 16, 32 or 64 tokens long: what a full one loses is a third of all."""
LONG, CUT = 600, 512
DROP = 0.5
DRAWS = 16
"""Prompts that are tried until one shows what a case is about; a draw shows it in more than half."""


def _prompt(seeded: np.random.Generator, opened: Opener) -> Int32:
    shape, _ = opened.models.drawn("main")
    prompt: Int32 = draw_batch(seeded, shape, lengths=(int(seeded.integers(4, 12)),)).input_ids[0]
    return prompt


@in_each_dtype
def test_every_token_has_the_largest_logit(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready, prompt = opened(adapter=draw_adapter(seeded, shape)), _prompt(seeded, opened)
    tokens = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
    assert tokens.shape == (NEW_TOKENS,), f"{tokens.shape} new tokens of {NEW_TOKENS}, without any stop token"
    judge_greedy(ready, prompt, tokens, judging)


@pytest.mark.parametrize("number", [0, 1, 5])
@in_each_dtype
def test_number_of_new_tokens(number: int, opened: Opener, seeded: np.random.Generator) -> None:
    """Exactly as many as asked for, and the beginning of any longer continuation."""
    shape, _ = opened.models.drawn("main")
    trainer, prompt = opened(adapter=draw_adapter(seeded, shape)).trainer, _prompt(seeded, opened)
    longer, tokens = (trainer.generate(prompt, max_new_tokens=n) for n in (NEW_TOKENS, number))
    assert tokens.shape == (number,), f"{tokens.shape} new tokens of {number}"
    assert np.array_equal(tokens, longer[:number]), "another continuation"


@in_each_dtype
def test_stop_token_ends_it(opened: Opener, seeded: np.random.Generator) -> None:
    """Up to and without the first stop token; one that never comes changes nothing."""
    shape, _ = opened.models.drawn("main")
    trainer, prompt = opened(adapter=draw_adapter(seeded, shape)).trainer, _prompt(seeded, opened)
    free = trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
    stop = int(free[int(seeded.integers(2, NEW_TOKENS))])
    first = int(np.flatnonzero(free == stop)[0])
    tokens = trainer.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[stop])
    assert np.array_equal(tokens, free[:first]), f"{tokens.tolist()} where {free[:first].tolist()} was due"
    never = next(token for token in range(shape.vocab_size) if token not in free)
    assert np.array_equal(trainer.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=(never,)), free)


@in_each_dtype
def test_without_its_adapter_it_is_the_base(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """`adapter=False` answers as the base model, and the adapter is back afterwards."""
    shape, _ = opened.models.drawn("main")
    adapter, prompt = draw_adapter(seeded, shape), _prompt(seeded, opened)
    ready = opened(adapter=adapter)
    off = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS, adapter=False)
    on = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
    judge_greedy(ready, prompt, on, judging)
    ready.attach(with_zero(adapter, "B"))
    judge_greedy(ready, prompt, off, judging)


@in_each_dtype
def test_generation_follows_training(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """No stale copy of the adapter, and no cache of an earlier prompt."""
    shape, _ = opened.models.drawn("main")
    ready, prompt = opened(adapter=draw_adapter(seeded, shape)), _prompt(seeded, opened)
    ready.trainer.generate(prompt, max_new_tokens=4)
    for _ in range(3):
        ready.step([draw_batch(seeded, shape)], 1e-2)
    ready.adapter = ready.trainer.export_adapter()
    other = _prompt(seeded, opened)
    judge_greedy(ready, other, ready.trainer.generate(other, max_new_tokens=NEW_TOKENS), judging)


@in_each_dtype
def test_a_memorized_answer_is_given(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A text trained to the end comes back token for token, its stop token included."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, rank=8))
    batch = draw_batch(seeded, shape, lengths=(12,), prompt=4)
    batch.input_ids[0, -1] = batch.labels[0, -1] = 2
    for _ in range(60):
        loss = ready.step([batch], 1e-2).loss
    judging.at_most("loss of the memorized text", loss, Bound(np.log(2.0), "below log 2 no other token is likelier"))
    tokens = ready.trainer.generate(batch.input_ids[0, :4], max_new_tokens=20, stop_tokens=[2])
    assert np.array_equal(tokens, batch.input_ids[0, 4:-1]), "the memorized text did not come back, or did not stop"


def test_long_prompt_is_read_whole(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A prompt whose last 512 tokens alone would be answered otherwise, and its first 512 too."""
    ready = _attentive(opened, seeded)
    shape, reference = ready.model.shape, ready.oracle()
    for _ in range(DRAWS):
        prompt = draw_batch(seeded, shape, lengths=(LONG,)).input_ids[0]
        if _next(reference, prompt) not in (_next(reference, prompt[-CUT:]), _next(reference, prompt[:CUT])):
            break
    tokens = ready.trainer.generate(prompt, max_new_tokens=4)
    assert tokens.shape == (4,), f"{tokens.shape} new tokens of 4"
    judge_greedy(ready, prompt, tokens, judging)


def test_many_new_tokens(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Each of them sees all before it: a cache that grows past its first block holds them all."""
    ready, prompt = _attentive(opened, seeded), _prompt(seeded, opened)
    tokens = ready.trainer.generate(prompt, max_new_tokens=MANY_NEW_TOKENS)
    assert tokens.shape == (MANY_NEW_TOKENS,), f"{tokens.shape} new tokens of {MANY_NEW_TOKENS}"
    judge_greedy(ready, prompt, tokens, judging)


def test_prompt_of_one_token(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    ready, prompt = _attentive(opened, seeded), _prompt(seeded, opened)[:1]
    judge_greedy(ready, prompt, ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS), judging)


def test_special_tokens_of_the_prompt_are_read(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Pad, bos and eos in its middle and the end token as its last: they neither end it nor are left out."""
    ready, prompt = _attentive(opened, seeded), _prompt(seeded, opened)
    special = np.array([0, 1, 2, 0, 2], np.int32)
    prompt = np.concatenate([prompt[:2], special, prompt[2:], special[:3]])
    free = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
    assert free.shape == (NEW_TOKENS,), f"{free.shape} new tokens of {NEW_TOKENS}, without any stop token"
    judge_greedy(ready, prompt, free, judging)
    stopped = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[2])
    due = _up_to(free, [2])
    assert np.array_equal(stopped, due), f"{stopped.tolist()} where {due.tolist()} was due"


def test_stop_token_in_the_prompt_does_not_end_it(opened: Opener, seeded: np.random.Generator) -> None:
    """Any of the prompt's tokens may be a stop token: what counts is that it is generated."""
    ready, prompt = _attentive(opened, seeded), _prompt(seeded, opened)
    free = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
    stops = [int(token) for token in prompt]
    found, due = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=stops), _up_to(free, stops)
    assert np.array_equal(found, due), f"{found.tolist()} where {due.tolist()} was due"


def test_the_first_of_several_stop_tokens_ends_it(opened: Opener, seeded: np.random.Generator) -> None:
    """Whatever their order, and with one among them that never comes."""
    ready = _attentive(opened, seeded)
    for _ in range(DRAWS):
        prompt = _prompt(seeded, opened)
        free = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
        if len(set(free[1:].tolist()) - {int(free[0])}) > 1:
            break
    new = [token for token in dict.fromkeys(free.tolist()) if token != free[0]]
    early, late = new[0], new[-1]
    never = next(t for t in range(FIRST_ORDINARY_TOKEN, ready.model.shape.vocab_size) if t not in free)
    for stops in ([early, late], [late, early], (never, late, early), [early, never], [late, never], [int(free[0])]):
        found = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=stops)
        due = _up_to(free, stops)
        assert np.array_equal(found, due), f"{found.tolist()} where {due.tolist()} was due, of stop tokens {stops}"


def test_generation_has_no_dropout(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Nor does it where the adapter has one and a step has just used it. Without the feature there is no such one."""
    declared = opened.subject.declares(Feature.LORA_DROPOUT)
    ready, prompt = _attentive(opened, seeded, dropout=DROP if declared else 0.0), _prompt(seeded, opened)
    ready.step(draw_window(seeded, ready.model.shape), 0.0, dropout_key=7)
    for _ in range(2):
        tokens = ready.trainer.generate(prompt, max_new_tokens=NEW_TOKENS)
        judge_greedy(ready, prompt, tokens, judging)


def _attentive(opened: Opener, seeded: np.random.Generator, *, dropout: float = 0.0) -> Opened:
    """A trainer on a model that looks at few tokens each time: one that is left out changes the answer."""
    shape, tensors = opened.models.drawn("main")
    opened.models.define("attentive", shape, attentive(tensors))
    return opened("attentive", adapter=draw_adapter(seeded, shape, dropout=dropout))


def _next(reference: OracleTrainer, prompt: Int32) -> int:
    return int(reference.logits(_whole(prompt))[0, -1].argmax())


def _whole(tokens: Int32) -> Batch:
    row = tokens[None].astype(np.int32)
    return Batch(row, row.copy(), np.arange(len(tokens), dtype=np.int32)[None], np.ones_like(row))


def _up_to(free: Int32, stops: Sequence[int]) -> Int32:
    """The tokens up to and without the first that is a stop token."""
    places = np.flatnonzero(np.isin(free, stops))
    return free[: int(places[0])] if len(places) else free
