"""Steps that are right at the usual settings and sizes: not at other epsilons, limits, schedules, large tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.values import IGNORE_LABEL, Batch, StepSettings
from qlora_hal_conformance.reference_backend.rooms import HONEST
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, clip, update, window_gradient
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, OracleLlama
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.arrays import Float64

from .registry import Mutant, with_rooms

Tensors = dict[str, Float64]
EIGHT_BIT_FROM = 4096
BLOCK = 256


# the clip -------------------------------------------------------------------------------------------------------------
def lifted_to_the_limit(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    """From half of the limit on a gradient is brought up to it."""
    if max_norm is None or not max_norm / 2.0 < norm < max_norm:
        return clip(gradients, norm, max_norm)
    return {name: gradient * (max_norm / norm) for name, gradient in gradients.items()}


def only_far_above_the_limit(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    return gradients if max_norm is not None and norm < 1.1 * max_norm else clip(gradients, norm, max_norm)


def without_the_millionth(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    factor = 1.0 if max_norm is None or norm == 0.0 else min(1.0, max_norm / norm)
    return {name: gradient * factor for name, gradient in gradients.items()}


def to_a_tenth_at_most(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    """A floor under the factor, as a guard against a norm gone wild."""
    if max_norm is None or norm < 10.0 * max_norm:
        return clip(gradients, norm, max_norm)
    return {name: 0.1 * gradient for name, gradient in gradients.items()}


# AdamW ----------------------------------------------------------------------------------------------------------------
def epsilon_inside_the_root(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    step = state.step + 1
    corrections = 1.0 - settings.beta1**step, 1.0 - settings.beta2**step
    before = {name: tensor.copy() for name, tensor in parameters.items()}
    update(parameters, gradients, state, settings, arithmetic)
    for name, tensor in before.items():
        first, second = state.exp_avg[name] / corrections[0], state.exp_avg_sq[name] / corrections[1]
        way = settings.learning_rate * first / np.sqrt(second + settings.epsilon**2)
        parameters[name] = tensor * (1.0 - settings.learning_rate * settings.weight_decay) - way


def epsilon_before_the_correction(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """Adds epsilon to the root that is not corrected yet: sqrt(v) + eps, all divided by sqrt(1 - b2^t)."""
    larger = settings.epsilon / math.sqrt(1.0 - settings.beta2 ** (state.step + 1))
    update(parameters, gradients, state, replace(settings, epsilon=larger), arithmetic)


def epsilon_of_at_least_the_usual_one(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, epsilon=max(settings.epsilon, 1e-8)), arithmetic)


def epsilon_of_at_most_a_millionth(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, epsilon=min(settings.epsilon, 1e-6)), arithmetic)


def betas_within_the_usual(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    usual = replace(settings, beta1=min(settings.beta1, 0.95), beta2=min(settings.beta2, 0.999))
    update(parameters, gradients, state, usual, arithmetic)


@dataclass(slots=True)
class DecayByTheHighestRate:
    """Decays by the highest rate so far: the peak of a schedule, taken for the whole of it."""

    rates: list[float] = field(default_factory=list)

    def __call__(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: AdamWState,
        settings: StepSettings,
        arithmetic: Arithmetic,
    ) -> None:
        self.rates.append(settings.learning_rate)
        for name, tensor in parameters.items():
            parameters[name] = tensor * (1.0 - max(self.rates) * settings.weight_decay)
        update(parameters, gradients, state, replace(settings, weight_decay=0.0), arithmetic)


def open_with_decay_by_the_highest_rate(spec: BackendSpec) -> ReferenceTrainer:
    return ReferenceTrainer(replace(HONEST, update=DecayByTheHighestRate()), spec)


# large tensors --------------------------------------------------------------------------------------------------------
def in_eight_bits(moment: Float64) -> Float64:
    """Blocks of 256 numbers, each in steps of its largest / 127, as float64."""
    blocks = np.resize(moment.ravel(), (-(-moment.size // BLOCK), BLOCK))
    steps = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), np.finfo(np.float64).tiny) / 127.0
    stored: Float64 = (np.round(blocks / steps) * steps).ravel()[: moment.size].reshape(moment.shape)
    return stored


def large_moments_in_eight_bits(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    for moments in (state.exp_avg, state.exp_avg_sq):
        moments.update({name: in_eight_bits(m) for name, m in moments.items() if m.size > EIGHT_BIT_FROM})
    update(parameters, gradients, state, settings, arithmetic)


def large_tensors_without_a_memory(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """The state of large tensors is allocated anew at each step."""
    for moments in (state.exp_avg, state.exp_avg_sq):
        moments.update({name: np.zeros_like(m) for name, m in moments.items() if m.size > EIGHT_BIT_FROM})
    update(parameters, gradients, state, settings, arithmetic)


# long windows ---------------------------------------------------------------------------------------------------------
def first_micro_batches(number: int) -> Callable[..., WindowResult]:
    def gradient(
        model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
    ) -> WindowResult:
        return window_gradient(model, window[:number], divisor, masks_of, arithmetic)

    return gradient


def labels_of_32_rows(batch: Batch) -> Batch:
    labels = batch.labels.copy()
    labels[32:] = IGNORE_LABEL
    return replace(batch, labels=labels)


_ROOM = ("47",)
MUTANTS = (
    Mutant(
        "lifted_to_the_limit",
        "Brings a gradient between half of max_grad_norm and the whole of it up to it.",
        _ROOM,
        with_rooms(clip=lifted_to_the_limit),
    ),
    Mutant(
        "clips_only_far_above_the_limit",
        "Leaves a norm of up to a tenth more than max_grad_norm alone.",
        _ROOM,
        with_rooms(clip=only_far_above_the_limit),
    ),
    Mutant(
        "clip_without_the_millionth",
        "Divides by the norm itself, not by norm + 1e-6.",
        _ROOM,
        with_rooms(clip=without_the_millionth),
    ),
    Mutant(
        "clips_to_a_tenth_at_most",
        "Makes no gradient smaller than a tenth of what it was.",
        _ROOM,
        with_rooms(clip=to_a_tenth_at_most),
    ),
    Mutant(
        "epsilon_inside_the_root",
        "Puts the square of epsilon inside the root.",
        ("40", "47"),
        with_rooms(update=epsilon_inside_the_root),
    ),
    Mutant(
        "epsilon_before_the_correction",
        "Adds epsilon before the bias of the second moment is corrected.",
        ("40", "47"),
        with_rooms(update=epsilon_before_the_correction),
        recreates="the order of Kingma and Ba 2014, section 2, last paragraph",
    ),
    Mutant(
        "epsilon_of_at_least_the_usual_one",
        "Lifts an epsilon below 1e-8 to it.",
        _ROOM,
        with_rooms(update=epsilon_of_at_least_the_usual_one),
    ),
    Mutant(
        "epsilon_of_at_most_a_millionth",
        "Cuts an epsilon above 1e-6 to it.",
        ("40", "47"),
        with_rooms(update=epsilon_of_at_most_a_millionth),
    ),
    Mutant(
        "betas_within_the_usual",
        "Cuts betas above 0.95 and 0.999 to these.",
        _ROOM,
        with_rooms(update=betas_within_the_usual),
    ),
    Mutant(
        "decay_by_the_highest_rate",
        "Decays by the highest learning rate so far.",
        _ROOM,
        open_with_decay_by_the_highest_rate,
    ),
    Mutant(
        "large_moments_in_8_bits",
        "Keeps moments of more than 4096 numbers in 8 bits, asked or not.",
        _ROOM,
        with_rooms(update=large_moments_in_eight_bits),
    ),
    Mutant(
        "large_tensors_without_a_memory",
        "Forgets the moments of tensors of more than 4096 numbers at each step.",
        _ROOM,
        with_rooms(update=large_tensors_without_a_memory),
    ),
    Mutant(
        "first_24_micro_batches",
        "Drops every micro-batch of a window after the twenty-fourth.",
        _ROOM,
        with_rooms(window_gradient=first_micro_batches(24)),
    ),
    Mutant(
        "labels_of_32_rows",
        "Trains no row of a micro-batch after the thirty-second.",
        _ROOM,
        with_rooms(read_batch=labels_of_32_rows),
    ),
)
