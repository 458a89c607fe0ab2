"""Wrong tokens counted, or counted wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    PADDING_SEGMENT,
    Batch,
    LossSum,
    PendingStep,
    StepSettings,
    StepStats,
)
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, window_gradient
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, OracleLlama
from qlora_hal_oracle.arrays import Float64

from .registry import Mutant, with_rooms, with_trainer

EOS = 2


def labels_shifted_twice(batch: Batch) -> Batch:
    shifted = np.full_like(batch.labels, IGNORE_LABEL)
    shifted[:, :-1] = batch.labels[:, 1:]
    return replace(batch, labels=shifted)


def padding_counted(batch: Batch) -> Batch:
    return replace(
        batch, labels=np.where(batch.segment_ids == PADDING_SEGMENT, batch.input_ids, batch.labels).astype(np.int32)
    )


def prompt_counted(batch: Batch) -> Batch:
    labels = np.where(batch.segment_ids != PADDING_SEGMENT, batch.input_ids, batch.labels)
    return replace(batch, labels=labels.astype(np.int32))


def eos_never_trained(batch: Batch) -> Batch:
    return replace(batch, labels=np.where(batch.labels == EOS, IGNORE_LABEL, batch.labels).astype(np.int32))


def _uncounted(batch: Batch) -> Batch:
    return replace(batch, labels=np.full_like(batch.labels, IGNORE_LABEL))


def mean_of_means(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    total: dict[str, Float64] = {}
    losses = []
    for index, batch in enumerate(window):
        # Only this micro-batch; the others are emptied, so that masks keep their index.
        alone = [batch if other == index else _uncounted(batch_there) for other, batch_there in enumerate(window)]
        one = window_gradient(model, alone, max(batch.counted_tokens, 1), masks_of, arithmetic)
        losses.append(one.loss_sum)
        for name, gradient in one.gradients.items():
            total[name] = total.get(name, 0.0) + gradient / len(window)
    return WindowResult(math.fsum(losses), total)


def in_pairs(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    """A window of an odd length loses its last micro-batch."""
    kept = window[: len(window) - len(window) % 2] if len(window) > 1 else window
    return window_gradient(model, kept, divisor, masks_of, arithmetic)


def last_micro_batch_only(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    whole = window_gradient(model, window, divisor, masks_of, arithmetic)
    return WindowResult(whole.loss_sum, window_gradient(model, window[-1:], divisor, masks_of, arithmetic).gradients)


def own_count_as_divisor(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    return window_gradient(model, window, sum(batch.counted_tokens for batch in window), masks_of, arithmetic)


class PartialWindowDropped(ReferenceTrainer):
    """A window shorter than the longest one seen changes nothing, and says nothing."""

    longest = 0

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.longest = max(self.longest, len(window))
        if len(window) == self.longest:
            return super().train_step(window, settings)
        found = self.evaluate(window)
        return Done(StepStats(found.loss_sum, sum(batch.counted_tokens for batch in window), 1.0))


class NanReportedAsZero(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        return Done(replace(stats, loss_sum=0.0, grad_norm=0.0, applied=True)) if not stats.applied else Done(stats)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found = super().evaluate(batches)
        return found if math.isfinite(found.loss_sum) else replace(found, loss_sum=0.0)


class MeanReportedAsSum(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        return Done(replace(stats, loss_sum=stats.loss))


MUTANTS = (
    Mutant(
        "labels_shifted_twice",
        "Shifts labels that are shifted when they are scored.",
        ("31",),
        with_rooms(read_batch=labels_shifted_twice),
        may_fail=("30",),
    ),
    Mutant(
        "padding_counted",
        "Takes padding for targets.",
        ("31",),
        with_rooms(read_batch=padding_counted),
        may_fail=("30",),
    ),
    Mutant(
        "prompt_counted",
        "Trains on the prompt's tokens.",
        ("31",),
        with_rooms(read_batch=prompt_counted),
        recreates="unslothai/unsloth#11321",
        may_fail=("30",),
    ),
    Mutant(
        "eos_never_trained",
        "Leaves the end-of-sequence token out of the loss.",
        ("31",),
        with_rooms(read_batch=eos_never_trained),
        recreates="trl#976",
    ),
    Mutant(
        "mean_of_means",
        "Averages the micro-batches' means, so that a short one weighs as much as a long one.",
        ("31", "41"),
        with_rooms(window_gradient=mean_of_means),
        recreates="transformers#34263",
    ),
    Mutant(
        "odd_micro_batch_dropped",
        "Takes micro-batches in pairs and drops the odd one.",
        ("41",),
        with_rooms(window_gradient=in_pairs),
    ),
    Mutant(
        "partial_window_dropped",
        "Throws away a window that is shorter than the ones before it.",
        ("41",),
        with_trainer(PartialWindowDropped),
        recreates="transformers#35438",
    ),
    Mutant(
        "gradients_cleared_between_micro_batches",
        "Keeps the gradient of the last micro-batch alone.",
        ("31", "41"),
        with_rooms(window_gradient=last_micro_batch_only),
        recreates="ml-explore/mlx-lm#511",
    ),
    Mutant(
        "global_denominator_ignored",
        "Divides by its own tokens where the core gives the count of all ranks.",
        ("41",),
        with_rooms(window_gradient=own_count_as_divisor),
    ),
    Mutant(
        "nan_reported_as_zero",
        "Reports a loss that is not a number as 0, as an applied step.",
        ("40", "90"),
        with_trainer(NanReportedAsZero),
        recreates="unslothai/unsloth#3385",
    ),
    Mutant("mean_reported_as_sum", "Reports the mean loss as the sum.", ("40",), with_trainer(MeanReportedAsSum)),
)
