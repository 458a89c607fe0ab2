"""One optimizer step of a backend beside the oracle's, each from the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qlora_hal.contract.values import Batch, Float32, OptimizerSnapshot, StepStats
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, oracle_step
from qlora_hal_conformance.tolerances import (
    OwnUpdate,
    UpdateSettings,
    gradient_bounds,
    gradient_noise,
    is_coarse,
    loss_bound,
    norm_bound,
    norm_noise,
    own_update,
    update_bounds,
)
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.adamw import clip_factor, global_norm


def oracle_at_state_of(ready: Opened) -> OracleTrainer:
    """The oracle with the backend's own weights, adapter and moments as they stand."""
    exported = ready.trainer.export_adapter()
    oracle = ready.oracle(exported)
    snapshot = ready.trainer.export_optimizer()
    oracle.import_optimizer(snapshot.step, snapshot.moments)
    return oracle


def judge_step(
    ready: Opened,
    reference: OracleTrainer,
    window: Sequence[Batch],
    given: UpdateSettings,
    judging: Judge,
    *,
    dropout_key: int = 0,
) -> StepStats:
    """Take one step on both sides and compare figures, adapter and moments. `reference` is left one step on; where the
    adapter has dropout, it is the oracle of that key.

    What the step did with its gradient is judged apart from how exact the gradient is: the update must be AdamW's of
    the gradient that the step's own moments show, to float32 whatever the compute dtype.
    """
    settings = asdict(given)
    before = Held(ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer())
    stats = ready.step(window, settings.pop("learning_rate"), dropout_key=dropout_key, **settings)
    after = Held(ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer())
    judge_taken_step(before, after, stats, reference, window, given, ready.dtype, judging)
    return stats


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An adapter's tensors and its optimizer, as they were at one time."""

    tensors: Mapping[str, Float32]
    optimizer: OptimizerSnapshot


def judge_taken_step(
    before: Held,
    after: Held,
    stats: StepStats,
    reference: OracleTrainer,
    window: Sequence[Batch],
    given: UpdateSettings,
    dtype: str,
    judging: Judge,
    *,
    ranks: int = 1,
) -> None:
    """`judge_step` of a step that was taken elsewhere, by `ranks` that shared the window. `reference` has the state
    before it, and is left one step on."""
    bounds = update_bounds(reference, window, dtype, given, ranks=ranks)
    gradients = reference.gradients(window)
    noise = gradient_noise(reference, window, dtype) if is_coarse(dtype) else None
    of_norm = (
        norm_bound(gradient_bounds(reference, window, dtype, ranks=ranks), gradients)
        if noise is None
        else norm_noise(noise, gradients)
    )
    of_loss = loss_bound(reference, window, dtype, ranks=ranks)
    adapter, snapshot = after.tensors, after.optimizer
    settings = asdict(given)
    expected = oracle_step(reference, window, settings.pop("learning_rate"), **settings)
    assert stats.applied, "the step was not applied"
    assert stats.token_count == expected.token_count, f"{stats.token_count} tokens, {expected.token_count} count"
    judging.within("loss sum", np.array(stats.loss_sum), np.array(expected.loss_sum), of_loss)
    judging.within("gradient norm before clipping", np.array(stats.grad_norm), np.array(expected.grad_norm), of_norm)
    step, moments = reference.export_optimizer()
    assert snapshot.step == step, f"the optimizer says step {snapshot.step} after {step}"
    judging.all_within("adapter after the step", adapter, reference.export_adapter(), bounds.parameters)
    judging.all_within("moments after the step", snapshot.moments, moments, bounds.moments)
    used = _judge_own_update(before, after, stats, given, judging)
    if noise is not None:
        factor = clip_factor(expected.grad_norm, given.max_grad_norm)
        clipped = {name: factor * gradient for name, gradient in gradients.items()}
        allowed = {
            name: bound.times(2.0 * factor, "gradient and norm, clipped").plus(used.gradient_bounds[name])
            for name, bound in noise.items()
        }
        judging.all_whole("clipped gradients", used.gradients, clipped, allowed)


def _judge_own_update(before: Held, after: Held, stats: StepStats, given: UpdateSettings, judging: Judge) -> OwnUpdate:
    """The clipped gradient that the first moments show, and how exactly they show it, after the second moments, the
    adapter and the norm were found to be those that AdamW makes of it."""
    exact = own_update(before.tensors, before.optimizer, after.optimizer, given)
    squares = {name: after.optimizer.moments[f"{name}.exp_avg_sq"] for name in before.tensors}
    judging.all_within("second moments by the first", squares, exact.second, exact.second_bounds)
    judging.all_within("adapter by its moments", after.tensors, exact.parameters, exact.parameter_bounds)
    clipped = stats.grad_norm * clip_factor(stats.grad_norm, given.max_grad_norm)
    judging.within("norm by the moments", np.array(clipped), np.array(global_norm(exact.gradients)), exact.norm_bound)
    return exact


def drawn_moments(ready: Opened, window: Sequence[Batch], step: int, random: np.random.Generator) -> OptimizerSnapshot:
    """Moments as after `step` updates, of the size of this window's gradients: neither young nor converged."""
    gradients = ready.trainer.gradients(window)
    moments = {}
    for name, gradient in gradients.items():
        size = float(np.sqrt((gradient.astype(np.float64) ** 2).mean())) + 1e-12
        first = random.normal(size=gradient.shape) * size * 0.3
        moments[f"{name}.exp_avg"] = first.astype(np.float32)
        second = (first**2 + size**2 * random.uniform(0.2, 1.0, gradient.shape)) * (1.0 - 0.999**step)
        moments[f"{name}.exp_avg_sq"] = second.astype(np.float32)
    return OptimizerSnapshot(step, moments)
