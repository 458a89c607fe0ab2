"""L2: one optimizer step against the oracle's AdamW, clipping included."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE
from qlora_hal.contract.values import Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_change, judge_logits, opened_unless_refused
from qlora_hal_conformance.fixtures import Opened, Opener, oracle_step
from qlora_hal_conformance.parameters import OracleOf, each_dtype, each_format, in_each_dtype
from qlora_hal_conformance.random_inputs import (
    at_real_tokens,
    draw_adapter,
    draw_batch,
    draw_window,
    total_tokens,
    with_field,
)
from qlora_hal_conformance.tolerances import (
    UpdateSettings,
    gradient_bounds,
    learning_shortfall,
    master_weights,
)
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.adamw import global_norm
from qlora_hal_oracle.random_models import EMBEDDING, FIRST_ORDINARY_TOKEN, linear_shapes

RATE = 1e-2
SETTINGS = {
    "plain": UpdateSettings(RATE, max_grad_norm=None),
    "clipped": UpdateSettings(RATE, max_grad_norm=0.05),
    "clip_not_reached": UpdateSettings(RATE, max_grad_norm=1e6),
    "decayed": UpdateSettings(RATE, weight_decay=2.0, max_grad_norm=None),
    "decayed_at_a_low_rate": UpdateSettings(1e-4, weight_decay=200.0, max_grad_norm=None),
    "other_betas": UpdateSettings(RATE, beta1=0.5, beta2=0.9, max_grad_norm=None),
    "everything": UpdateSettings(RATE, weight_decay=0.5, max_grad_norm=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6),
}
CLIP = 2.0
TINY_RATE, TINY_STEPS = 1e-6, 50
"""50 updates of 1e-6 move a weight by 5e-5: three float32 digits below 0.05, and nothing at all in bfloat16."""
POISONED_TOKEN = FIRST_ORDINARY_TOKEN


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@in_each_dtype
def test_first_step(
    settings: UpdateSettings, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """With a fresh optimizer the bias correction is everything: without it the step is a tenth, or a thousandfold."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    judge_step(ready, oracle(ready), draw_window(seeded, shape), settings, judging)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@in_each_dtype
def test_later_step(settings: UpdateSettings, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """From given moments at a drawn step: decay of the moments, bias correction in between."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ready.trainer.import_optimizer(drawn_moments(ready, window, int(seeded.integers(2, 40)), seeded))
    judge_step(ready, oracle_at_state_of(ready), window, settings, judging)


@in_each_dtype
def test_epsilon_stands_outside_the_root(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """An epsilon of the size of the gradient: inside the root it would count by its root."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    reference = oracle(ready)
    gradients = reference.gradients(window)
    size = global_norm(gradients) / sum(gradient.size for gradient in gradients.values()) ** 0.5
    judge_step(ready, reference, window, UpdateSettings(RATE, epsilon=size, max_grad_norm=None), judging)


@in_each_dtype
def test_clip_at_more_than_one(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Gradients longer than 2, clipped to it: a token count smaller than the true one makes them as long."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    reference = oracle(ready)
    norm = global_norm(reference.gradients(window))
    count = max(1, int(total_tokens(window) * min(1.0, norm / (4 * CLIP))))
    bounds = gradient_bounds(reference, window, ready.dtype)
    stats = ready.step(window, 0.0, beta1=0.0, max_grad_norm=CLIP, denominator=float(count))
    longer = total_tokens(window) / count
    assert norm * longer > 2 * CLIP, "the case has no gradient to clip"
    assert stats.applied
    factor = CLIP / norm
    moments = ready.trainer.export_optimizer().moments
    found = {name.removesuffix(".exp_avg"): m for name, m in moments.items() if name.endswith(".exp_avg")}
    expected = {name: factor * gradient for name, gradient in reference.gradients(window).items()}
    judging.all_within(
        "clipped gradients", found, expected, {n: b.times(2 * factor, "clipped") for n, b in bounds.items()}
    )


@in_each_dtype
def test_three_steps_with_changing_rates(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Each step uses the rate it was given, not the one before; the first has none and moves nothing."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for rate in (0.0, RATE, RATE / 8):
        judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), UpdateSettings(rate), judging)


@pytest.mark.parametrize("weight_format", each_format())
def test_base_is_the_same_after_training(weight_format, opened: Opener, seeded: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    """Bit for bit, in every format; the adapter is all that moves, and all of it does."""
    shape, _ = opened.models.drawn("main")
    ready = opened(weight_format=weight_format, adapter=draw_adapter(seeded, shape))
    before = {module: ready.trainer.dequantized_weight(module) for module in linear_shapes(shape)}
    for _ in range(3):
        ready.step(draw_window(seeded, shape), RATE, weight_decay=0.1)
    for module, weight in before.items():
        assert np.array_equal(ready.trainer.dequantized_weight(module), weight), f"{module} changed"
    after = ready.trainer.export_adapter().tensors
    still = [name for name, tensor in ready.adapter.tensors.items() if np.array_equal(tensor, after[name])]  # type: ignore[union-attr]
    assert not still, f"{len(still)} tensors never changed: {still[:3]}"


@in_each_dtype
def test_logits_follow_the_step(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """The forward pass after a step is that of the exported adapter: no stale copy of it."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    before = at_real_tokens(ready.trainer.logits(batch), batch)
    for _ in range(2):
        ready.step(draw_window(seeded, shape), RATE)
    reference = ready.oracle(ready.trainer.export_adapter())
    found = judge_logits(ready, reference, batch, judging)
    judge_change("logits before and after", found, before, reference, batch, ready, judging)


@pytest.mark.parametrize("dtype", each_dtype())
def test_tiny_updates_add_up(dtype: str, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Master weights are float32 whatever the compute dtype: 50 updates of 1e-6 arrive."""
    shape, _ = opened.models.drawn("main")
    ready = opened(dtype=dtype, adapter=draw_adapter(seeded, shape))
    window = [draw_batch(seeded, shape, lengths=(12,))]
    for _ in range(TINY_STEPS):
        ready.step(window, TINY_RATE)
    start, after = ready.adapter.tensors, ready.trainer.export_adapter().tensors  # type: ignore[union-attr]
    moved = np.concatenate([np.abs(after[n].astype(np.float64) - start[n]).ravel() for n in start])
    # The gradient hardly changes on so short a way, so Adam moves every weight by the rate at every step.
    shortfall = 1.0 - float(np.median(moved)) / (TINY_RATE * TINY_STEPS)
    judging.at_most("part of the median way that is missing", abs(shortfall), master_weights())


@in_each_dtype
def test_refused_step_changes_nothing_and_says_so(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A token whose embedding is NaN makes loss and gradient NaN: reported as such, never as 0, never applied."""
    shape, ready = _poisoned(opened, seeded)
    if ready is None:
        return
    good, bad = _good_and_bad(shape, seeded)
    ready.step([good], RATE)
    adapter, snapshot = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer()
    for window in ([bad], [good, bad]):
        stats = ready.step(window, RATE, weight_decay=0.1)
        assert not stats.applied, "a step with a NaN loss was applied"
        assert not np.isfinite(stats.loss_sum), f"a NaN loss was reported as {stats.loss_sum}"
    judging.equal("adapter", ready.trainer.export_adapter().tensors, adapter)
    after = ready.trainer.export_optimizer()
    judging.equal("moments", after.moments, snapshot.moments)
    assert after.step == snapshot.step, "the refused step was counted"


@in_each_dtype
def test_good_step_after_a_refused_one(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """It is the step that it would have been."""
    shape, ready = _poisoned(opened, seeded)
    if ready is None:
        return
    good, bad = _good_and_bad(shape, seeded)
    ready.step([bad], RATE)
    ready.model.tensors[EMBEDDING][POISONED_TOKEN] = 0.0  # the oracle need not know the NaN: `good` has no such token
    judge_step(ready, oracle_at_state_of(ready), [good], UpdateSettings(RATE), judging)


@in_each_dtype
def test_evaluation_of_nan_is_nan(opened: Opener, seeded: np.random.Generator) -> None:
    shape, ready = _poisoned(opened, seeded)
    if ready is not None:
        _, bad = _good_and_bad(shape, seeded)
        found = ready.trainer.evaluate([bad])
        assert not np.isfinite(found.loss_sum), f"a NaN loss was reported as {found.loss_sum}"


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, id=name, marks=[pytest.mark.needs(feature)] if feature else [])
        for name, feature in OPTIMIZER_FEATURE.items()
    ],
)
def test_every_optimizer_learns(
    optimizer: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Moments may be stored in 8 bits; the loss still falls about as far as with exact ones."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, rank=8), optimizer=optimizer)
    window, reference = draw_window(seeded, shape), oracle(ready)
    losses = [ready.step(window, RATE).loss for _ in range(8)]
    exact = [step.loss_sum / step.token_count for step in (oracle_step(reference, window, RATE) for _ in range(8))]
    fall, expected = losses[0] - losses[-1], exact[0] - exact[-1]
    judging.at_most("part of the exact fall that is missing", max(1.0 - fall / expected, 0.0), learning_shortfall())


def _poisoned(opened: Opener, seeded: np.random.Generator) -> tuple[LlamaShape, Opened | None]:
    """A model whose embedding of one token is NaN; None when the backend refuses it, by our error, which is as good."""
    shape, tensors = opened.models.drawn("main")
    poisoned = {name: tensor.copy() for name, tensor in tensors.items()}
    poisoned[EMBEDDING][POISONED_TOKEN] = np.nan
    opened.models.define("poisoned", shape, poisoned)
    adapter = draw_adapter(seeded, shape)
    return shape, opened_unless_refused(opened, "poisoned", adapter)


def _good_and_bad(shape: LlamaShape, seeded: np.random.Generator) -> tuple[Batch, Batch]:
    batch = draw_batch(seeded, shape)
    clean = np.where(batch.input_ids == POISONED_TOKEN, POISONED_TOKEN + 1, batch.input_ids).astype(np.int32)
    labels = np.where(batch.labels == POISONED_TOKEN, POISONED_TOKEN + 1, batch.labels).astype(np.int32)
    good = with_field(batch, input_ids=clean, labels=labels)
    poisoned = clean.copy()
    poisoned[0, 2] = POISONED_TOKEN
    return good, with_field(good, input_ids=poisoned)


@in_each_dtype
def test_tied_model_moves_only_its_adapter(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """After steps on a tied model its logits are still those of the embedding on disk."""
    shape, _ = opened.models.drawn("tied")
    ready, window = opened("tied", adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    for _ in range(3):
        ready.step(window, RATE)
    judge_logits(ready, oracle_at_state_of(ready), window[0], judging)
