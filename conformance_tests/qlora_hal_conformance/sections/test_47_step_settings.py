"""L2: what the core decides for a step, at its edges, and steps of another size: long windows, large tensors."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE
from qlora_hal.contract.values import Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients
from qlora_hal_conformance.fixtures import Opened, Opener, oracle_step
from qlora_hal_conformance.hostile_inputs import quiet
from qlora_hal_conformance.parameters import OracleOf, in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_many_rows, draw_window, rows_of
from qlora_hal_conformance.tolerances import UpdateSettings, gradient_bounds, learning_shortfall
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.adamw import clip_factor, global_norm

RATE = 1e-2
AROUND_THE_LIMIT = {"half": 50, "just_below": 97, "just_above": 103, "threefold": 300, "a_hundredfold": 10_000}
"""The gradient's norm in hundredths of the limit."""
SETTINGS = {
    "no_first_moment": UpdateSettings(RATE, beta1=0.0, beta2=0.5, max_grad_norm=None),
    "long_memory": UpdateSettings(RATE, beta1=0.99, beta2=0.9999, max_grad_norm=None),
    "beta2_below_beta1": UpdateSettings(RATE, beta1=0.95, beta2=0.6, max_grad_norm=None),
    "epsilon_of_a_thousandth": UpdateSettings(RATE, epsilon=1e-3, max_grad_norm=None),
    "no_epsilon_to_speak_of": UpdateSettings(RATE, epsilon=1e-15, max_grad_norm=None),
}
RATES = (RATE / 10, RATE, 0.0, RATE / 100)
"""A schedule's rates."""
LARGE_RANK = 64
"""64 x 128 numbers in the smallest tensor: more than the 4096 from which optimizers store moments in 8 bits."""


@in_each_dtype
@pytest.mark.parametrize("hundredths", AROUND_THE_LIMIT.values(), ids=AROUND_THE_LIMIT)
def test_clip_around_its_limit(
    hundredths: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Above the limit a gradient is brought down to it; below, it is what it is."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    reference = oracle(ready)
    limit = 100 * global_norm(reference.gradients(window)) / hundredths
    _judge_clipped(ready, reference, window, limit, judging)


@in_each_dtype
def test_clip_of_small_gradients(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """The divisor is norm + 1e-6, as in torch and MLX: where the norm itself is a millionth, that counts."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=quiet(draw_adapter(seeded, shape), opened.main_dtype)), _one(opened, seeded)
    reference = oracle(ready)
    _judge_clipped(ready, reference, window, global_norm(reference.gradients(window)) / 2, judging)


@in_each_dtype
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_steps(settings: UpdateSettings, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A first step and the one after it: what the first left in the moments counts."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for _ in range(2):
        judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), settings, judging)


@in_each_dtype
@pytest.mark.parametrize("epsilon", [1, 10**4], ids=["tiny", "of_their_size"])
def test_epsilon_beside_small_gradients(
    epsilon: int, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """In units of 1e-12: a tiny one is not lifted to the usual one; one of the gradients' size halves the way."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=quiet(draw_adapter(seeded, shape), opened.main_dtype))
    settings = UpdateSettings(RATE, epsilon=epsilon / 10**12, max_grad_norm=None)
    judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), settings, judging)


@in_each_dtype
def test_decay_follows_the_rate(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Each step decays by its own rate; where that is 0, nothing decays."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for rate in RATES:
        given = UpdateSettings(rate, weight_decay=0.5)
        judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), given, judging)


@in_each_dtype
def test_twenty_five_micro_batches(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, whole = opened(adapter=draw_adapter(seeded, shape)), draw_many_rows(seeded, shape, rows=25)
    judge_gradients(ready.trained_gradient(rows_of(whole)), oracle(ready), [whole], ready, judging)


@in_each_dtype
def test_thirty_three_rows(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """In one micro-batch: one more than a block of 32."""
    shape, _ = opened.models.drawn("main")
    ready, whole = opened(adapter=draw_adapter(seeded, shape)), draw_many_rows(seeded, shape, rows=33)
    judge_gradients(ready.trained_gradient([whole]), oracle(ready), [whole], ready, judging)


@in_each_dtype
def test_large_tensors(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Moments of tensors of more than 4096 numbers are float32 as well: imported, used, and exported."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape, rank=LARGE_RANK)), _one(opened, seeded)
    ready.trainer.import_optimizer(drawn_moments(ready, window, int(seeded.integers(2, 40)), seeded))
    for _ in range(2):
        judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE, weight_decay=0.1), judging)


@in_each_dtype
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, id=name, marks=[pytest.mark.needs(feature)] if feature else [])
        for name, feature in OPTIMIZER_FEATURE.items()
    ],
)
def test_every_optimizer_learns_with_large_tensors(
    optimizer: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Only here do 8-bit optimizers store moments in 8 bits."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, rank=LARGE_RANK), optimizer=optimizer)
    window, reference = _one(opened, seeded), oracle(ready)
    losses = [ready.step(window, RATE / 4).loss for _ in range(6)]
    exact = [step.loss_sum / step.token_count for step in (oracle_step(reference, window, RATE / 4) for _ in range(6))]
    fall, expected = losses[0] - losses[-1], exact[0] - exact[-1]
    judging.at_most("part of the exact fall that is missing", max(1.0 - fall / expected, 0.0), learning_shortfall())


def _one(opened: Opener, seeded: np.random.Generator) -> list[Batch]:
    shape, _ = opened.models.drawn("main")
    return [draw_batch(seeded, shape)]


def _judge_clipped(ready: Opened, reference: OracleTrainer, window: list[Batch], limit: float, judging: Judge) -> None:
    """With beta1 = 0 the first moment is the clipped gradient, and with a rate of 0 nothing moves."""
    gradients, bounds = reference.gradients(window), gradient_bounds(reference, window, ready.dtype)
    factor = clip_factor(global_norm(gradients), limit)
    stats = ready.step(window, 0.0, beta1=0.0, max_grad_norm=limit)
    assert stats.applied, f"an ordinary step was refused: {stats}"
    moments = ready.trainer.export_optimizer().moments
    found = {name.removesuffix(".exp_avg"): m for name, m in moments.items() if name.endswith(".exp_avg")}
    expected = {name: factor * gradient for name, gradient in gradients.items()}
    allowed = {name: bound.times(2 * factor, "clipped") for name, bound in bounds.items()}
    judging.all_within("clipped gradients", found, expected, allowed)
