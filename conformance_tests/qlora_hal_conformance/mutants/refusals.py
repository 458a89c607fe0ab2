"""Steps that had to be refused for their gradient alone, and leave something behind all the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import Batch, PendingStep, StepSettings, StepStats
from qlora_hal_conformance.reference_backend.step import clip, update
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle.adamw import AdamWState, global_norm
from qlora_hal_oracle.arrays import Float64

from .registry import Mutant, with_trainer

Tensors = dict[str, Float64]
LARGEST = float(np.finfo(np.float32).max)


class _Lenient(ReferenceTrainer):
    """Honest but where the loss is finite and the gradient is not: there `take` says what happens."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        if stats.applied or not math.isfinite(stats.loss_sum):
            return Done(stats)
        found = self.gradient_of(window, settings.denominator, self._masks_of(settings.dropout_key))
        with np.errstate(all="ignore"):
            return Done(self.take(found.gradients, settings, stats))

    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        raise NotImplementedError

    def move(self, gradients: Tensors, settings: StepSettings) -> None:
        update(self.attached.parameters, gradients, self.attached.state, settings, self.arithmetic)


class FiniteLossDecides(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        self.move(clip(gradients, stats.grad_norm, settings.max_grad_norm), settings)
        return replace(stats, applied=True)


class CutToTheLargestNumber(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        cut = {name: np.nan_to_num(g, nan=0.0, posinf=LARGEST, neginf=-LARGEST) for name, g in gradients.items()}
        norm = global_norm(cut)
        self.move(clip(cut, norm, settings.max_grad_norm), settings)
        return replace(stats, grad_norm=norm, applied=True)


class FiniteTensorsMove(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        finite = {name: gradient for name, gradient in gradients.items() if np.isfinite(gradient).all()}
        counted = self.attached.state.step
        self.move(finite, settings)
        self.attached.state.step = counted
        return stats


class ClippedToNothing(_Lenient):
    """An infinite norm makes a factor of 0: what was finite becomes 0, and AdamW decays the moments."""

    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        if settings.max_grad_norm is None:
            return stats
        self.move({name: np.zeros_like(gradient) for name, gradient in gradients.items()}, settings)
        return replace(stats, applied=True)


class RefusalCounted(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        self.attached.state.step += 1
        return stats


class DecayedBeforeTheCheck(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        for tensor in self.attached.parameters.values():
            tensor *= 1.0 - settings.learning_rate * settings.weight_decay
        return stats


class MomentsForgotten(_Lenient):
    """Starts the optimizer over, as who rebuilds it after an overflow."""

    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        self.attached.state = AdamWState(self.attached.state.step)
        return stats


class NormOfZeroTold(_Lenient):
    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        return replace(stats, grad_norm=0.0)


class FirstMicroBatchChecked(_Lenient):
    """Looks whether the first micro-batch has a finite gradient; the others are added unseen."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        first = self.gradient_of(window[:1], settings.denominator, self._masks_of(settings.dropout_key))
        finite = all(np.isfinite(gradient).all() for gradient in first.gradients.values())
        return super().train_step(window, settings) if finite else ReferenceTrainer.train_step(self, window, settings)

    def take(self, gradients: Tensors, settings: StepSettings, stats: StepStats) -> StepStats:
        self.move(gradients, settings)
        return replace(stats, applied=True)


_ROOM = ("46",)
MUTANTS = (
    Mutant(
        "finite_loss_decides",
        "Applies a step whose gradient is not finite where its loss is.",
        _ROOM,
        with_trainer(FiniteLossDecides),
    ),
    Mutant(
        "gradient_cut_to_the_largest_number",
        "Makes numbers of what is not finite in a gradient, and applies the step.",
        _ROOM,
        with_trainer(CutToTheLargestNumber),
    ),
    Mutant(
        "finite_tensors_move",
        "Refuses a step, and moves the tensors whose gradient is finite.",
        _ROOM,
        with_trainer(FiniteTensorsMove),
    ),
    Mutant(
        "infinite_norm_clips_to_nothing",
        "Clips by an infinite norm: gradients of zero decay the moments.",
        _ROOM,
        with_trainer(ClippedToNothing),
        recreates="torch.nn.utils.clip_grad_norm_ with error_if_nonfinite=False",
    ),
    Mutant(
        "refusal_counted",
        "Counts a step that was refused for its gradient.",
        _ROOM,
        with_trainer(RefusalCounted),
    ),
    Mutant(
        "decayed_before_the_check",
        "Decays the adapter before the gradient is looked at.",
        _ROOM,
        with_trainer(DecayedBeforeTheCheck),
    ),
    Mutant(
        "moments_forgotten_at_a_refusal",
        "Starts with fresh moments after a step that was refused for its gradient.",
        _ROOM,
        with_trainer(MomentsForgotten),
    ),
    Mutant(
        "norm_of_zero_told",
        "Tells a gradient that is not finite as a norm of zero.",
        _ROOM,
        with_trainer(NormOfZeroTold),
    ),
    Mutant(
        "first_micro_batch_checked",
        "Looks at the gradient of the first micro-batch alone.",
        _ROOM,
        with_trainer(FirstMicroBatchChecked),
    ),
)
