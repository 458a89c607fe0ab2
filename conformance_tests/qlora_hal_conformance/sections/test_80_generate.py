"""L4: greedy continuation, judged on the backend's own logits."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Int32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_greedy as _judge_greedy
from qlora_hal_conformance.fixtures import Opener
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, with_zero
from qlora_hal_conformance.tolerances import Bound

pytestmark = pytest.mark.needs(Feature.GENERATE)

NEW_TOKENS = 12


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
    _judge_greedy(ready, prompt, tokens, judging)


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
    _judge_greedy(ready, prompt, on, judging)
    ready.attach(with_zero(adapter, "B"))
    _judge_greedy(ready, prompt, off, judging)


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
    _judge_greedy(ready, other, ready.trainer.generate(other, max_new_tokens=NEW_TOKENS), judging)


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
