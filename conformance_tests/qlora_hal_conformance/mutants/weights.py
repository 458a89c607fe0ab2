"""Wrong weights of tokens, and wrong losses to make them from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import Batch, Float32, LossSum, PendingStep, StepSettings
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

from .registry import Mutant, with_rooms, with_trainer

Weigh = Callable[[Batch, Float32], Float32]


def reading(weigh: Weigh) -> Callable[[Batch], Batch]:
    """A `read_batch` that sees other weights."""

    def read(batch: Batch) -> Batch:
        if batch.weights is None:
            return batch
        return replace(batch, weights=weigh(batch, batch.weights).astype(np.float32))

    return read


def to_a_mean_of_one(batch: Batch, weights: Float32) -> Float32:
    counts = batch.labels[:, 1:] != -100
    mean = float(weights[:, 1:][counts].mean()) if counts.any() else 0.0
    return weights / mean if mean else weights


class WeightsOfTheFirstBatch(ReferenceTrainer):
    """Without weights in its first micro-batch, a window has none."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        if window[0].weights is None:
            window = [replace(batch, weights=None) for batch in window]
        return super().train_step(window, settings)


class WeightedSumAsLoss(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        weighted = stats.weighted_loss_sum
        return Done(stats if weighted is None else replace(stats, loss_sum=weighted))


class WeightsIgnoredInEvaluation(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found = super().evaluate(batches)
        return found if found.weighted_loss_sum is None else replace(found, weighted_loss_sum=found.loss_sum)


class UnweightedBatchesLeftOut(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found, weighted = super().evaluate(batches), [batch for batch in batches if batch.weights is not None]
        if not weighted:
            return found
        return replace(found, weighted_loss_sum=super().evaluate(weighted).weighted_loss_sum)


class LossesWhereTheyAreMade(ReferenceTrainer):
    """Puts the loss of a token at the place that predicts it."""

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        return np.roll(super().token_losses(batch, adapter=adapter), -1, axis=1)


class LossesOfTheAdapterAlways(ReferenceTrainer):
    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        return super().token_losses(batch)


class AdapterStaysAway(ReferenceTrainer):
    """After the base was asked alone, the adapter does not come back."""

    away = False

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        self.away = self.away or not adapter
        return super().token_losses(batch, adapter=not self.away)


class AskingMovesTheMoments(ReferenceTrainer):
    """The adapter is the same after it was asked for losses, the optimizer is not."""

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        found = super().token_losses(batch, adapter=adapter)
        self.train_step([batch], StepSettings(0.0, float(batch.counted_tokens))).resolve()
        return found


class MeanLossOfARow(ReferenceTrainer):
    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        found = super().token_losses(batch, adapter=adapter)
        counts = np.maximum((found != 0).sum(axis=1, keepdims=True), 1)
        return np.where(found != 0, found.sum(axis=1, keepdims=True) / counts, 0.0).astype(np.float32)


MUTANTS = (
    Mutant(
        "weights_ignored",
        "Reads no weights.",
        ("45",),
        with_rooms(read_batch=reading(lambda batch, weights: np.ones_like(weights))),
    ),
    Mutant(
        "weights_applied_twice",
        "Squares the weights.",
        ("45",),
        with_rooms(read_batch=reading(lambda batch, weights: weights * weights)),
    ),
    Mutant(
        "weights_made_positive",
        "Takes the size of a weight, not its sign.",
        ("45",),
        with_rooms(read_batch=reading(lambda b, w: np.abs(w))),
    ),
    Mutant(
        "weights_normalised",
        "Divides the weights by their mean.",
        ("45",),
        with_rooms(read_batch=reading(to_a_mean_of_one)),
    ),
    Mutant(
        "weights_shifted",
        "Gives a token the weight of the one before it.",
        ("45",),
        with_rooms(read_batch=reading(lambda b, w: np.roll(w, 1, axis=1))),
    ),
    Mutant(
        "weights_of_the_first_row",
        "Gives every row of a micro-batch the weights of its first.",
        ("45",),
        with_rooms(read_batch=reading(lambda b, w: np.broadcast_to(w[:1], w.shape))),
    ),
    Mutant(
        "weights_lost_in_a_mixed_window",
        "Drops all weights of a window whose first micro-batch has none.",
        ("45",),
        with_trainer(WeightsOfTheFirstBatch),
    ),
    Mutant(
        "weighted_sum_told_as_loss", "Tells the weighted sum as the loss.", ("45",), with_trainer(WeightedSumAsLoss)
    ),
    Mutant(
        "weights_ignored_in_evaluation",
        "Tells the plain sum of losses as the weighted one.",
        ("45",),
        with_trainer(WeightsIgnoredInEvaluation),
    ),
    Mutant(
        "unweighted_batches_left_out_of_the_evaluation",
        "Leaves batches without weights out of the weighted sum when another has some.",
        ("45",),
        with_trainer(UnweightedBatchesLeftOut),
    ),
    Mutant(
        "token_losses_shifted",
        "Puts each token's loss one place early.",
        ("45",),
        with_trainer(LossesWhereTheyAreMade),
    ),
    Mutant(
        "token_losses_of_the_adapter_always",
        "Cannot be asked for the base alone.",
        ("45",),
        with_trainer(LossesOfTheAdapterAlways),
    ),
    Mutant(
        "adapter_stays_away",
        "Leaves the adapter off once the base was asked alone.",
        ("45",),
        with_trainer(AdapterStaysAway),
    ),
    Mutant(
        "asking_for_losses_moves_the_moments",
        "Moves the moments by the tokens whose losses it is asked for.",
        ("45",),
        with_trainer(AskingMovesTheMoments),
    ),
    Mutant("token_losses_averaged", "Gives each token its row's mean loss.", ("45",), with_trainer(MeanLossOfARow)),
)
