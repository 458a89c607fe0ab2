"""L2: weighted tokens, and the losses that objectives make weights from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import OracleOf, in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window, packed, total_tokens
from qlora_hal_conformance.tolerances import Bound, gradient_bounds, logits_bound, loss_bound
from qlora_hal_oracle.trainer import OracleTrainer

RATE, LOUD, GIVEN_DENOMINATOR = 1e-3, 1e6, 7.5
VALUES = (0.0, 0.25, 1.0, -1.5, 3.0)
"""A preference gives its rejected answer negative weights; 0 takes a token out of the loss."""

pytestmark = pytest.mark.needs(Feature.TOKEN_WEIGHTS)


@in_each_dtype
def test_gradient_of_weighted_tokens(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """sum(weight * loss) / denominator: weights are neither normalised nor averaged, and the denominator is given."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), _weighted(seeded, draw_window(seeded, shape))
    _judge(ready, oracle(ready), window, judging, denominator=GIVEN_DENOMINATOR)


@pytest.mark.needs(Feature.PACKING)
@in_each_dtype
def test_weights_of_packed_samples(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    together = packed([draw_batch(seeded, shape, lengths=(11, 7, 13))], time=36)
    _judge(ready, oracle(ready), _weighted(seeded, [together]), judging, denominator=GIVEN_DENOMINATOR)


@in_each_dtype
def test_batches_with_and_without_weights_share_a_window(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, (first, second) = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    for window in ([*_weighted(seeded, [first]), second], [first, *_weighted(seeded, [second])]):
        _judge(ready, oracle(ready), window, judging, denominator=GIVEN_DENOMINATOR)


@in_each_dtype
def test_weights_where_nothing_counts_do_not_matter(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), _weighted(seeded, draw_window(seeded, shape))
    drowned = [np.where(batch.labels == IGNORE_LABEL, LOUD, 0.0) for batch in window]
    loud = [_with_weights(b, b.weights + more) for b, more in zip(window, drowned, strict=True)]
    reference = oracle(ready)
    judge_gradients(ready.trained_gradient(loud), reference, window, ready, judging)


@in_each_dtype
def test_weights_of_one_are_no_weights(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ones = [_with_weights(batch, np.ones_like(batch.labels)) for batch in window]
    judge_gradients(ready.trained_gradient(ones), oracle(ready), window, ready, judging)


@in_each_dtype
def test_weights_of_zero_change_nothing(opened: Opener, seeded: np.random.Generator) -> None:
    """The step is applied: its gradient is zero, and no NaN."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    silent = [_with_weights(batch, np.zeros_like(batch.labels)) for batch in window]
    stats = ready.step(silent, 0.0)
    assert (stats.applied, stats.grad_norm, stats.weighted_loss_sum) == (True, 0.0, 0.0), f"{stats}"
    assert stats.token_count == total_tokens(window)


@in_each_dtype
def test_both_sums_are_told(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """The sum of losses does not know the weights; the weighted sum is what was minimised. Without weights there is
    none."""
    shape, _ = opened.models.drawn("main")
    ready, plain = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    window, reference = _weighted(seeded, plain), oracle(ready)
    expected = sum(_weighted_sum(reference, batch) for batch in window)
    bound = loss_bound(reference, plain, ready.dtype)
    for told in (ready.trainer.evaluate(window), ready.step(window, 0.0)):
        assert told.token_count == total_tokens(window)
        assert told.weighted_loss_sum is not None, "no weighted sum was given"
        judging.within("loss sum", np.array(told.loss_sum), np.array(reference.evaluate(plain)[0]), bound)
        judging.within("weighted sum", np.array(told.weighted_loss_sum), np.array(expected), _widest(bound))
    assert ready.trainer.evaluate(plain).weighted_loss_sum is None
    assert ready.step(plain, 0.0).weighted_loss_sum is None


@in_each_dtype
@pytest.mark.parametrize("weighted", [0, 1], ids=["the_first_alone", "the_last_alone"])
def test_weights_in_one_batch_alone(
    weighted: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The tokens of a batch without weights weigh 1, whatever the other batch says."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    [window[weighted]] = _weighted(seeded, [window[weighted]])
    reference = oracle(ready)
    expected = sum(_weighted_sum(reference, batch) for batch in window)
    bound = _widest(loss_bound(reference, window, ready.dtype))
    for told in (ready.trainer.evaluate(window), ready.step(window, 0.0)):
        assert told.weighted_loss_sum is not None, "no weighted sum was given"
        judging.within("weighted sum", np.array(told.weighted_loss_sum), np.array(expected), bound)


@in_each_dtype
def test_losses_of_tokens(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """One for each counted token, where its label stands; 0 elsewhere."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    reference = oracle(ready)
    for batch in (*draw_window(seeded, shape), draw_batch(seeded, shape, lengths=(9, 5), time=16)):
        _judge_losses(ready, reference, batch, judging)


@pytest.mark.needs(Feature.PACKING)
@in_each_dtype
def test_losses_of_packed_tokens(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    _judge_losses(ready, oracle(ready), packed([draw_batch(seeded, shape, lengths=(8, 12, 6))], time=32), judging)


@in_each_dtype
def test_losses_of_the_base_alone(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The reference model of preference tuning: the adapter is away for this one call."""
    shape, _ = opened.models.drawn("main")
    adapter, batch = draw_adapter(seeded, shape), draw_batch(seeded, shape)
    ready = opened(adapter=adapter)
    bare = ready.oracle(replace(adapter, tensors={name: np.zeros_like(t) for name, t in adapter.tensors.items()}))
    bound = _of_a_token(logits_bound(bare, batch, ready.dtype))
    judging.within("losses", ready.trainer.token_losses(batch, adapter=False), bare.token_losses(batch), bound)
    _judge_losses(ready, oracle(ready), batch, judging)


@in_each_dtype
def test_asking_for_losses_changes_nothing(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The next gradient is the same, and where bits repeat, so are the next steps."""
    shape, _ = opened.models.drawn("main")
    adapter, window = draw_adapter(seeded, shape), draw_window(seeded, shape)
    asked, left_alone = opened(adapter=adapter), opened(adapter=adapter)
    _ask(asked, window[0])
    found, expected = (ready.trained_gradient(window) for ready in (asked, left_alone))
    if not opened.subject.declares(Feature.BITWISE_DETERMINISM):
        bounds = gradient_bounds(oracle(asked), window, asked.dtype)
        twice = {name: bound.times(2.0, "two of them") for name, bound in bounds.items()}
        judging.all_within("gradients", found, expected, twice)
        return
    judging.equal("gradients", found, expected)
    for _ in range(2):
        _ask(asked, window[0])
        for ready in (asked, left_alone):
            ready.step(window, RATE)
    after, untouched = (ready.trainer.export_adapter().tensors for ready in (asked, left_alone))
    judging.equal("adapter", after, untouched)


def _ask(ready: Opened, batch: Batch) -> None:
    for adapter in (True, False):
        ready.trainer.token_losses(batch, adapter=adapter)


def _judge(ready: Opened, reference: OracleTrainer, window: list[Batch], judging: Judge, *, denominator: float) -> None:
    found = ready.trained_gradient(window, denominator=denominator)
    judge_gradients(found, reference, window, ready, judging, denominator=denominator)


def _judge_losses(ready: Opened, reference: OracleTrainer, batch: Batch, judging: Judge) -> None:
    found = ready.trainer.token_losses(batch)
    counts = np.zeros(batch.labels.shape, bool)
    counts[:, 1:] = batch.labels[:, 1:] != IGNORE_LABEL
    assert found.dtype == np.float32
    assert found.shape == batch.labels.shape, f"losses {list(found.shape)}"
    assert not found[~counts].any(), "a token that does not count has a loss"
    bound = _of_a_token(logits_bound(reference, batch, ready.dtype))
    judging.within("losses", found, reference.token_losses(batch), bound)


def _weighted_sum(reference: OracleTrainer, batch: Batch) -> float:
    weights = 1.0 if batch.weights is None else batch.weights
    return float((reference.token_losses(batch) * weights).sum())


def _of_a_token(bound: Bound) -> Bound:
    """log sum exp(z) - z[label]: each term moves by at most the largest error of z."""
    return bound.times(2.0, "two terms")


def _widest(bound: Bound) -> Bound:
    return bound.times(max(abs(value) for value in VALUES), "largest weight")


def _weighted(random: np.random.Generator, window: list[Batch]) -> list[Batch]:
    return [_with_weights(batch, random.choice(VALUES, batch.labels.shape)) for batch in window]


def _with_weights(batch: Batch, weights: np.ndarray) -> Batch:  # type: ignore[type-arg]
    return replace(batch, weights=weights.astype(np.float32))
