"""Wrong steps: clip, AdamW, learning rate, what is trained, dropout, what evaluation leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import (
    AdapterConfig,
    Batch,
    Float32,
    Int32,
    LinearShape,
    LossSum,
    PendingStep,
    StepSettings,
    StepStats,
)
from qlora_hal_conformance.reference_backend import dropout
from qlora_hal_conformance.reference_backend.rooms import HONEST
from qlora_hal_conformance.reference_backend.rounding import to_bfloat16
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, clip, update
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic
from qlora_hal_oracle.adamw import AdamWState, clip_factor, global_norm
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.loss import token_loss_sum

from .registry import Mutant, with_rooms, with_trainer

Tensors = dict[str, Float64]


def clip_each_tensor(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    return {n: g * clip_factor(float(np.sqrt((g**2).sum())), max_norm) for n, g in gradients.items()}


def never_clip(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    return gradients


def no_bias_correction(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """MLX's default. The correction is a factor of the rate (eps aside), so undo it there."""
    step = state.step + 1
    factor = (1 - settings.beta1**step) / math.sqrt(1 - settings.beta2**step)
    decay = settings.weight_decay / factor
    uncorrected = replace(settings, learning_rate=settings.learning_rate * factor, weight_decay=decay)
    update(parameters, gradients, state, uncorrected, arithmetic)


def coupled_decay(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    coupled = {name: gradient + settings.weight_decay * parameters[name] for name, gradient in gradients.items()}
    update(parameters, coupled, state, replace(settings, weight_decay=0.0), arithmetic)


def no_decay(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, weight_decay=0.0), arithmetic)


def default_betas(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, beta1=0.9, beta2=0.999, epsilon=1e-8), arithmetic)


def bfloat16_master(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, settings, arithmetic)
    parameters.update({name: to_bfloat16(tensor) for name, tensor in parameters.items()})


def a_never_trained(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    held = {name: tensor for name, tensor in parameters.items() if "lora_A" in name}
    update(parameters, gradients, state, settings, arithmetic)
    parameters.update(held)


@dataclass(slots=True)
class LateRate:
    """Each step uses the rate of the step before; the first uses its own."""

    last: list[float] = field(default_factory=list)

    def __call__(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: AdamWState,
        settings: StepSettings,
        arithmetic: Arithmetic,
    ) -> None:
        rate = self.last.pop() if self.last else settings.learning_rate
        self.last.append(settings.learning_rate)
        update(parameters, gradients, state, replace(settings, learning_rate=rate), arithmetic)


def open_with_late_rate(spec: BackendSpec) -> ReferenceTrainer:
    return ReferenceTrainer(replace(HONEST, update=LateRate()), spec)


class DropoutInEvaluation(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        masks_of = self._masks_of(0)
        losses = [
            token_loss_sum(
                self.attached.model.forward(batch, self.arithmetic, masks_of(batch)).logits,
                batch.labels,
                self.arithmetic,
            )
            for batch in batches
        ]
        return LossSum(math.fsum(losses), sum(batch.counted_tokens for batch in batches))


class EvaluationCorruptsGradients(ReferenceTrainer):
    """Evaluation repacks the weights in place; the forward pass knows, the backward pass does not."""

    repacked = False

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        self.repacked = True
        return super().evaluate(batches)

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if not self.repacked:
            return found
        return replace(found, gradients={name: np.roll(g, 1, axis=0) for name, g in found.gradients.items()})


class BaseTrained(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending = super().train_step(window, settings)
        # `model.base` holds the very arrays of the loaded base.
        for name, weight in self.attached.model.base.items():
            if name.endswith("q_proj.weight"):
                weight *= 1.0 - 0.1 * settings.learning_rate
        return pending


class TiedHeadTrained(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending = super().train_step(window, settings)
        if self.base.shape.tie_word_embeddings:
            table = self.attached.model.base["model.embed_tokens.weight"]
            table *= 1.0 - settings.learning_rate
        return pending


class NeverTrainedUnderCheckpointing(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if not self.compute.gradient_checkpointing:
            return found
        return replace(found, gradients={name: 0.0 * g for name, g in found.gradients.items()})


class GradientsAddUp(ReferenceTrainer):
    """`gradients` leaves what it found in the buffer of the next step."""

    left: Tensors | None = None

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        found = super().gradients(window)
        self.left = {name: gradient.astype(np.float64) for name, gradient in found.items()}
        return found

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        left, self.left = self.left, None
        if left is None:
            return super().train_step(window, settings)
        found = self.gradient_of(window, settings.denominator, self._masks_of(settings.dropout_key))
        total = {name: gradient + left[name] for name, gradient in found.gradients.items()}
        attached, norm = self.attached, global_norm(total)
        self.rooms.update(
            attached.parameters, clip(total, norm, settings.max_grad_norm), attached.state, settings, self.arithmetic
        )
        return Done(StepStats(found.loss_sum, sum(batch.counted_tokens for batch in window), norm))


class PoisonedStepApplied(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        if not stats.applied:
            for tensor in self.attached.parameters.values():
                tensor.fill(math.nan)
        return Done(stats)


class NormAfterClip(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        return Done(replace(stats, grad_norm=stats.grad_norm * clip_factor(stats.grad_norm, settings.max_grad_norm)))


class Noisy(ReferenceTrainer):
    """Atomic additions in an order that differs from run to run."""

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        noise = np.random.default_rng()
        return replace(
            found, gradients={n: g * (1 + 1e-7 * noise.uniform(-1, 1, g.shape)) for n, g in found.gradients.items()}
        )


def no_masks(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    return {}


def unscaled_masks(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    masks = dropout.draw_masks(config, modules, rows, time, key)
    return {module: mask * (1.0 - config.dropout) for module, mask in masks.items()}


def same_masks_each_step(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    return dropout.draw_masks(config, modules, rows, time, 0)


def masks_by_micro_batch(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    return dropout.draw_masks(config, modules, np.arange(len(rows), dtype=np.int32), time, key)


def masks_by_half_the_key(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    return dropout.draw_masks(config, modules, rows, time, key & (2**32 - 1))


def masks_of_a_generator(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(rows[0])]))
    rate = config.dropout
    return {
        module: (random.random((len(rows), time, modules[module].inputs)) >= rate) / (1.0 - rate)
        for module in config.target_modules
    }


def no_masks_at_low_rates(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> Mapping[str, Float64]:
    return dropout.draw_masks(config, modules, rows, time, key) if config.dropout >= 0.1 else {}


MUTANTS = (
    Mutant(
        "clip_per_tensor",
        "Clips each tensor by its own norm.",
        ("40",),
        with_rooms(clip=clip_each_tensor),
    ),
    Mutant("never_clips", "Ignores max_grad_norm.", ("40",), with_rooms(clip=never_clip)),
    Mutant(
        "no_bias_correction",
        "AdamW without bias correction.",
        ("40", "42"),
        with_rooms(update=no_bias_correction),
        recreates="the default of mlx.optimizers.AdamW",
    ),
    Mutant("decay_coupled", "Puts weight decay into the gradient.", ("40",), with_rooms(update=coupled_decay)),
    Mutant("decay_ignored", "Ignores weight decay.", ("40",), with_rooms(update=no_decay)),
    Mutant(
        "betas_and_epsilon_ignored",
        "Uses AdamW's usual betas and epsilon whatever the settings say.",
        ("40",),
        with_rooms(update=default_betas),
        may_fail=("31",),
    ),
    Mutant("rate_one_step_late", "Uses the learning rate of the step before.", ("40", "42"), open_with_late_rate),
    Mutant(
        "master_weights_in_bfloat16",
        "Keeps the adapter in bfloat16.",
        ("40", "42"),
        with_rooms(update=bfloat16_master),
        may_fail=("30", "31"),
    ),
    Mutant("a_never_trained", "Trains B alone.", ("40",), with_rooms(update=a_never_trained)),
    Mutant(
        "dropout_left_on_in_evaluation",
        "Drops adapter inputs in evaluate too.",
        ("30", "31", "40"),
        with_trainer(DropoutInEvaluation),
    ),
    Mutant(
        "evaluation_corrupts_gradients",
        "After an evaluation the gradients are wrong.",
        ("31", "40", "42"),
        with_trainer(EvaluationCorruptsGradients),
        recreates="bitsandbytes#2078",
    ),
    Mutant("base_trained", "Moves the frozen q_proj weights.", ("40", "42", "60"), with_trainer(BaseTrained)),
    Mutant("tied_head_trained", "Moves the tied embedding.", ("40", "42", "60"), with_trainer(TiedHeadTrained)),
    Mutant(
        "never_trained_under_checkpointing",
        "No gradient arrives when activations are recomputed.",
        ("31", "40"),
        with_trainer(NeverTrainedUnderCheckpointing),
        recreates="peft's enable_input_require_grads",
    ),
    Mutant(
        "gradients_add_up",
        "What the gradients view found is added to the next step.",
        ("31", "40"),
        with_trainer(GradientsAddUp),
    ),
    Mutant(
        "poisoned_step_applied",
        "A step with a gradient that is not finite still changes the adapter.",
        ("40", "90"),
        with_trainer(PoisonedStepApplied),
        recreates="AutoGPTQ#346",
    ),
    Mutant("norm_after_the_clip", "Reports the gradient norm after clipping.", ("40",), with_trainer(NormAfterClip)),
    Mutant(
        "same_seed_differs",
        "Declares bitwise determinism and differs from run to run.",
        ("43",),
        with_trainer(Noisy),
        recreates="Soup#354",
    ),
    Mutant(
        "dropout_declared_but_ignored",
        "Declares LoRA dropout and drops nothing.",
        ("43",),
        with_rooms(masks=no_masks),
        recreates="Soup v0.73.3: flags that were validated, documented and unread",
    ),
    Mutant(
        "dropout_not_rescaled",
        "Keeps inputs without the factor 1 / (1 - p).",
        ("43",),
        with_rooms(masks=unscaled_masks),
    ),
    Mutant(
        "same_dropout_in_every_step",
        "Ignores the step's dropout key.",
        ("43",),
        with_rooms(masks=same_masks_each_step),
    ),
    Mutant(
        "dropout_by_micro_batch",
        "Draws the mask of a row by its place in its micro-batch: a window that is cut drops other inputs.",
        ("43",),
        with_rooms(masks=masks_by_micro_batch),
        recreates="qlora_hal before contract 2: a step split under dropout differed by twice the learning rate",
    ),
    Mutant(
        "dropout_by_half_the_key",
        "Takes the lower 32 bits of the step's dropout key.",
        ("43",),
        with_rooms(masks=masks_by_half_the_key),
    ),
    Mutant(
        "dropout_of_a_generator_of_its_own",
        "Draws good masks of the right share, from another generator than the contract's.",
        ("43",),
        with_rooms(masks=masks_of_a_generator),
    ),
    Mutant(
        "no_dropout_at_low_rates",
        "Drops nothing below a rate of 0.1.",
        ("43",),
        with_rooms(masks=no_masks_at_low_rates),
    ),
)
