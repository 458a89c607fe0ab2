"""L2: a window of micro-batches is one batch. Sums over the whole window, divided once."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients
from qlora_hal_conformance.fixtures import Opener, placed
from qlora_hal_conformance.parameters import OracleOf, each_format, in_each_dtype
from qlora_hal_conformance.random_inputs import (
    draw_adapter,
    draw_batch,
    draw_many_rows,
    rows_of,
    total_tokens,
    with_field,
)
from qlora_hal_conformance.tolerances import UpdateSettings, summed
from qlora_hal_conformance.updating import judge_step, oracle_at_state_of

RATE = 1e-2
EQUAL = 64
"""A power of 2: the loss is divided by 64 times as many tokens, and no mantissa changes."""


def _unequal(seeded: np.random.Generator, opened: Opener, rows: int = 4) -> Batch:
    """Rows with 1, few and many counted tokens: a mean of means weighs them alike, a sum does not."""
    shape, _ = opened.models.drawn("main")
    batch = draw_batch(seeded, shape, lengths=(26, 22, 9, 14, 25, 7, 12, 18)[:rows], prompt=1)
    labels = batch.labels.copy()
    labels[0, :25] = IGNORE_LABEL
    labels[-1, :6] = IGNORE_LABEL
    return with_field(batch, labels=labels)


@pytest.mark.parametrize("weight_format", each_format())
def test_window_of_unequal_batches_equals_one_batch(  # type: ignore[no-untyped-def]
    weight_format, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(weight_format=weight_format, adapter=draw_adapter(seeded, shape))
    whole = _unequal(seeded, opened)
    reference = oracle(ready)
    for window in (rows_of(whole), [whole]):
        judge_gradients(ready.trainer.gradients(window), reference, [whole], ready, judging)
        judge_gradients(ready.trained_gradient(window), reference, [whole], ready, judging)


@in_each_dtype
def test_eight_micro_batches(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready, whole = opened(adapter=draw_adapter(seeded, shape)), _unequal(seeded, opened, rows=8)
    judge_gradients(ready.trained_gradient(rows_of(whole)), oracle(ready), [whole], ready, judging)


@in_each_dtype
def test_twenty_micro_batches(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready, whole = opened(adapter=draw_adapter(seeded, shape)), draw_many_rows(seeded, shape, rows=20)
    judge_gradients(ready.trained_gradient(rows_of(whole)), oracle(ready), [whole], ready, judging)


@in_each_dtype
def test_equal_micro_batches_have_the_gradient_of_one(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """64 times the same micro-batch: its rounding is the same each time, so what is left is that of the sum, which is
    float32 whatever the compute dtype. A sum in bfloat16 loses of each term what lies below a 256th of the total."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(6,), prompt=1)
    (batch,) = placed([batch])
    one, many = (ready.trained_gradient([batch] * times) for times in (1, EQUAL))
    judging.all_within("gradients", many, one, {name: summed(gradient, EQUAL) for name, gradient in one.items()})


@in_each_dtype
def test_order_of_micro_batches_does_not_matter(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, whole = opened(adapter=draw_adapter(seeded, shape)), _unequal(seeded, opened)
    judge_gradients(ready.trained_gradient(rows_of(whole)[::-1]), oracle(ready), [whole], ready, judging)


@in_each_dtype
def test_last_partial_window_is_a_window(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Windows of three, of one and of two micro-batches: each is divided by its own tokens, none is dropped."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for rows in (3, 1, 2):
        window = rows_of(_unequal(seeded, opened, rows=rows))
        judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@in_each_dtype
def test_micro_batch_without_a_counted_token(
    place: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """It adds nothing: no NaN from 0/0, no token counted, no place taken in a mean."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), rows_of(_unequal(seeded, opened, rows=2))
    silent = with_field(window[1], labels=np.full_like(window[1].labels, IGNORE_LABEL))
    with_silent = [*window[:place], silent, *window[place:]]
    reference = oracle(ready)
    judge_gradients(ready.trainer.gradients(with_silent), reference, window, ready, judging)
    judge_gradients(ready.trained_gradient(with_silent), reference, window, ready, judging)


@in_each_dtype
def test_denominator_is_that_of_the_global_window(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """One rank's share of a window is divided by the tokens of all ranks, which the core hands in."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), rows_of(_unequal(seeded, opened))
    found = ready.trained_gradient(window, denominator=4.0 * total_tokens(window))
    judge_gradients({name: 4 * gradient for name, gradient in found.items()}, oracle(ready), window, ready, judging)


@in_each_dtype
def test_loss_is_summed_over_the_window(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The figures of a step are sums and counts over all its micro-batches, and so is the norm."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    window = rows_of(_unequal(seeded, opened, rows=6))
    judge_step(ready, oracle(ready), window, UpdateSettings(RATE), judging)
