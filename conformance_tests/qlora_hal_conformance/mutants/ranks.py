"""Backends that are right alone and wrong together: what several ranks make of one window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import (
    Batch,
    Float64,
    Int32,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
    StepStats,
)
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.ranks import (
    Ranks,
    WholeWindow,
    gather,
    over_ranks,
    summed,
    votes,
    with_gradients,
)
from qlora_hal_conformance.reference_backend.rounding import to_bfloat16
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle.adamw import clip_factor, global_norm

from .registry import Mutant, with_rooms, with_trainer


# what crosses ---------------------------------------------------------------------------------------------------------
def mean_of_means(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """torch's DistributedDataParallel: each rank's own mean, and the mean of these."""
    size, factor = ranks.world.size, denominator / tokens if tokens else 0.0
    mean = {name: gradient * factor / size for name, gradient in own.gradients.items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), _whole(ranks, own, mean))


def denominator_of_each_rank(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    factor = denominator / tokens if tokens else 0.0
    mine = {name: gradient * factor for name, gradient in own.gradients.items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), _whole(ranks, own, mine))


def mean_over_ranks(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    whole = over_ranks(ranks, own, tokens, denominator)
    return with_gradients(whole, {n: g / ranks.world.size for n, g in whole.found.gradients.items()})


def first_rank_alone(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    mine = {n: g if ranks.world.rank == 0 else 0.0 * g for n, g in own.gradients.items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), _whole(ranks, own, mine))


def every_rank_alone(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    return with_gradients(over_ranks(ranks, own, tokens, denominator), own.gradients)


def clipped_before_the_sum(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """By the norm of each rank's own gradient, at 1."""
    factor = clip_factor(global_norm(own.gradients), 1.0) if ranks.world.size > 1 else 1.0
    mine = {name: gradient * factor for name, gradient in own.gradients.items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), _whole(ranks, own, mine))


def first_rank_twice(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    mine = {n: g * (2.0 if ranks.world.size > 1 and ranks.world.rank == 0 else 1.0) for n, g in own.gradients.items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), _whole(ranks, own, mine))


def in_bfloat16(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """Half the traffic."""
    if ranks.world.size == 1:
        return over_ranks(ranks, own, tokens, denominator)
    rounded = {name: to_bfloat16(gradient) for name, gradient in own.gradients.items()}
    whole = {name: to_bfloat16(gradient) for name, gradient in summed(ranks, rounded).items()}
    return with_gradients(over_ranks(ranks, own, tokens, denominator), whole)


def tokens_of_each_rank(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    return replace(over_ranks(ranks, own, tokens, denominator), tokens=tokens)


def loss_of_each_rank(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    whole = over_ranks(ranks, own, tokens, denominator)
    return replace(whole, found=replace(whole.found, loss_sum=own.loss_sum))


def weights_of_each_rank(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """Whether there is a weighted sum is seen on each rank's own batches."""
    whole = over_ranks(ranks, own, tokens, denominator)
    has_weights = own.weighted_loss_sum is not None
    return replace(
        whole, found=replace(whole.found, weighted_loss_sum=whole.found.weighted_loss_sum if has_weights else None)
    )


def only_full_windows(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """A window of which some rank has nothing that counts is let go."""
    whole = over_ranks(ranks, own, tokens, denominator)
    idle = ranks.sum(np.array([tokens == 0], np.float64))[0]
    return with_gradients(whole, {n: 0.0 * g for n, g in own.gradients.items()}) if idle else whole


def finite_parts_alone(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """Each rank decides for itself: one whose gradient is not finite gives nothing, and is the only one to refuse."""
    if ranks.world.size == 1:
        return over_ranks(ranks, own, tokens, denominator)
    is_finite = math.isfinite(global_norm(own.gradients))
    given = {n: g if is_finite else np.zeros_like(g) for n, g in own.gradients.items()}
    whole = over_ranks(ranks, replace(own, gradients=given), tokens, denominator)
    return whole if is_finite else with_gradients(whole, own.gradients)


def _whole(ranks: Ranks, own: WindowResult, mine: Mapping[str, Float64]) -> dict[str, Float64]:
    """The sum of what each rank gives; alone a rank is honest."""
    return own.gradients if ranks.world.size == 1 else summed(ranks, mine)


# steps ----------------------------------------------------------------------------------------------------------------
class NormOfEachRank(ReferenceTrainer):
    """Tells the norm of its own gradient; clips by that of all."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        own = self.gradient_of(window, settings.denominator, self._masks_of(settings.dropout_key))
        stats = super().train_step(window, settings).resolve()
        return Done(replace(stats, grad_norm=global_norm(own.gradients)) if stats.applied else stats)


class ClipsByItsOwnNorm(ReferenceTrainer):
    """Clips the sum by the norm of its own part, so that ranks part."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        own = self.gradient_of(window, settings.denominator, self._masks_of(settings.dropout_key))
        factor = clip_factor(global_norm(own.gradients), settings.max_grad_norm)
        honest = self.rooms
        self.rooms = replace(honest, clip=lambda gradients, norm, most: {n: g * factor for n, g in gradients.items()})
        try:
            return super().train_step(window, settings)
        finally:
            self.rooms = honest


class RepeatsRowsToBeEven(ReferenceTrainer):
    """torch's DistributedSampler: a rank with fewer micro-batches than the others has its first one again."""

    def whole_gradient(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WholeWindow:
        table = np.zeros(self.ranks.world.size)
        table[self.ranks.world.rank] = len(window)
        most = int(self.ranks.sum(table).max())
        again = [batch for batch in window[:1] for _ in range(most - len(window))]
        return super().whole_gradient([*window, *again], divisor, masks_of)


class EvaluatesForAll(ReferenceTrainer):
    """Adds evaluations up over the ranks, as the core does once more."""

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        own = super().evaluate(batches)
        [loss] = self.ranks.sum(np.array([own.loss_sum]))
        return replace(own, loss_sum=float(loss))


class StateOfTheFirstRankAlone(ReferenceTrainer):
    """Reads moments on rank 0."""

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        zeros = {name: np.zeros_like(moment) for name, moment in snapshot.moments.items()}
        super().import_optimizer(snapshot if self.ranks.world.rank == 0 else replace(snapshot, moments=zeros))


class RefusesOnTheFirstRankAlone(ReferenceTrainer):
    """Whether a step was applied is told as the last rank's own gradient was."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats: StepStats = super().train_step(window, settings).resolve()
        return Done(replace(stats, applied=True) if self.ranks.world.rank else stats)


# masks ----------------------------------------------------------------------------------------------------------------
class MasksByItsOwnRows(ReferenceTrainer):
    """Draws masks by a row's place on its own rank: the same masks on all."""

    def _masks_of(self, key: int) -> MasksOf:
        seen = 0

        def masks_of(batch: Batch) -> Mapping[str, Float64]:
            nonlocal seen
            rows: Int32 = np.arange(seen, seen + len(batch.input_ids), dtype=np.int32)
            if self.ranks.world.size == 1:
                return honest(batch)
            seen += len(rows)
            return honest(replace(batch, rows=rows))

        honest = super()._masks_of(key)
        return masks_of


class MasksByTheRank(ReferenceTrainer):
    """Adds the rank to the key."""

    def _masks_of(self, key: int) -> MasksOf:
        return super()._masks_of(key + self.ranks.world.rank)


# votes ----------------------------------------------------------------------------------------------------------------
def votes_of_float32(ranks: Ranks, values: Float64) -> Float64:
    return votes(ranks, values.astype(np.float32).astype(np.float64)) if ranks.world.size > 1 else values


def own_vote(ranks: Ranks, values: Float64) -> Float64:
    return values


def votes_of_the_first(ranks: Ranks, values: Float64) -> Float64:
    return votes(ranks, values if ranks.world.rank == 0 else 0.0 * values)


def votes_in_its_own_order(ranks: Ranks, values: Float64) -> Float64:
    """Every rank begins with its own: float64 sums of three differ in a last bit."""
    size, rank = ranks.world.size, ranks.world.rank
    parts = [np.frombuffer(part, np.float64) for part in ranks.of_each(values.tobytes())]
    total: Float64 = parts[rank].copy()
    for other in range(1, size):
        total = total + parts[(rank + other) % size]
    return total


# joining --------------------------------------------------------------------------------------------------------------
def without_ranks(spec: BackendSpec) -> BackendSpec:
    features = spec.capabilities.features - {Feature.DATA_PARALLEL, Feature.SHARDED_BASE}
    return replace(spec, capabilities=replace(spec.capabilities, features=features))


class JoinsUndeclared(ReferenceTrainer):
    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        return None


class LoadsForAWorldUndeclared(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, replace(compute, world=World()))


class FindsNoDevice(ReferenceTrainer):
    """Refuses a rank on a machine where ranks share the processor."""

    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        raise ConfigError("QH-R01", f"Rank {world.rank} has no device.", fix="Ask for fewer.")


# a spread base --------------------------------------------------------------------------------------------------------
def seven_bits(ranks: Ranks, part: bytes) -> list[bytes]:
    """Bytes that cross as signed ones, and come back as what they are at least."""
    return [bytes(min(byte, 127) for byte in found) for found in gather(ranks, part)]


def quiet_numbers(ranks: Ranks, part: bytes) -> list[bytes]:
    """Bytes that cross as bfloat16, two by two: what is no number there comes out as another that is none."""
    found = []
    for each in gather(ranks, part):
        words = np.frombuffer(each[: len(each) // 2 * 2], np.uint16).copy()
        is_nan = ((words & 0x7F80) == 0x7F80) & ((words & 0x007F) != 0)
        words[is_nan] |= 0x0040
        found.append(words.tobytes() + each[len(words) * 2 :])
    return found


def last_part_lost(ranks: Ranks, part: bytes) -> list[bytes]:
    found = gather(ranks, part)
    return [*found[:-1], bytes(len(found[-1]))] if ranks.world.size > 2 else found


_ROOM = ("85",)
_SECONDS = 180.0
"""The first case of each number of ranks waits for as many processes."""

_MUTANTS = (
    Mutant("mean_of_ranks_means", "Takes the mean of each rank's own token mean.", _ROOM,
           with_rooms(over_ranks=mean_of_means)),
    Mutant("denominator_of_each_rank", "Divides each rank's sum by its own tokens.", _ROOM,
           with_rooms(over_ranks=denominator_of_each_rank)),
    Mutant("gradients_averaged_over_ranks", "Divides the sum of all ranks by their number.", _ROOM,
           with_rooms(over_ranks=mean_over_ranks)),
    Mutant("gradient_of_the_first_rank", "Steps by rank 0's gradient.", _ROOM,
           with_rooms(over_ranks=first_rank_alone)),
    Mutant("gradient_of_each_rank", "Steps by each rank's own gradient.", _ROOM,
           with_rooms(over_ranks=every_rank_alone)),
    Mutant("clipped_before_the_sum", "Clips each rank's gradient before they are added.", _ROOM,
           with_rooms(over_ranks=clipped_before_the_sum)),
    Mutant("clips_by_its_own_norm", "Clips the sum by the norm of a rank's own part.", _ROOM,
           with_trainer(ClipsByItsOwnNorm)),
    Mutant("norm_of_each_rank", "Tells the norm of a rank's own gradient.", _ROOM, with_trainer(NormOfEachRank)),
    Mutant("data_of_the_first_rank_twice", "Adds rank 0's rows twice.", _ROOM, with_rooms(over_ranks=first_rank_twice)),
    Mutant("rows_repeated_to_be_even", "Repeats a micro-batch where a rank has fewer than the others.", _ROOM,
           with_trainer(RepeatsRowsToBeEven)),
    Mutant("last_window_lost", "Drops a window of which a rank has nothing.", _ROOM,
           with_rooms(over_ranks=only_full_windows)),
    Mutant("gradients_cross_in_bfloat16", "Adds the ranks' gradients in bfloat16.", _ROOM,
           with_rooms(over_ranks=in_bfloat16)),
    Mutant("tokens_of_each_rank", "Tells the counted tokens of a rank's own rows.", _ROOM,
           with_rooms(over_ranks=tokens_of_each_rank)),
    Mutant("loss_of_each_rank", "Tells the loss sum of a rank's own rows.", _ROOM,
           with_rooms(over_ranks=loss_of_each_rank)),
    Mutant("weights_of_each_rank", "Tells a weighted sum on the ranks whose own rows have weights.", _ROOM,
           with_rooms(over_ranks=weights_of_each_rank)),
    Mutant("each_rank_decides_alone", "Refuses a step on the rank whose own gradient is not finite.", _ROOM,
           with_rooms(over_ranks=finite_parts_alone)),
    Mutant("refusal_told_by_the_first_rank", "Says that a refused step was applied on all ranks but the first.", _ROOM,
           with_trainer(RefusesOnTheFirstRankAlone)),
    Mutant("evaluation_added_up_twice", "Gives the evaluation of all ranks where a rank's own is asked for.", _ROOM,
           with_trainer(EvaluatesForAll)),
    Mutant("moments_on_the_first_rank", "Restores the moments on rank 0 alone.", _ROOM,
           with_trainer(StateOfTheFirstRankAlone)),
    Mutant("masks_the_same_on_all_ranks", "Draws masks by a row's place on its rank.", _ROOM,
           with_trainer(MasksByItsOwnRows)),
    Mutant("masks_by_the_rank", "Adds a rank's number to the dropout key.", _ROOM, with_trainer(MasksByTheRank)),
    Mutant("votes_in_float32", "Adds votes in float32.", _ROOM, with_rooms(votes=votes_of_float32)),
    Mutant("votes_not_cast", "Gives each rank its own vote back.", _ROOM, with_rooms(votes=own_vote)),
    Mutant("votes_of_the_first_rank", "Gives every rank rank 0's vote.", _ROOM, with_rooms(votes=votes_of_the_first)),
    Mutant("votes_in_its_own_order", "Adds votes in another order on each rank.", _ROOM,
           with_rooms(votes=votes_in_its_own_order)),
    Mutant("joins_ranks_undeclared", "Joins ranks that it does not declare, and trains alone.", _ROOM,
           with_trainer(JoinsUndeclared), change_spec=without_ranks),
    Mutant("loads_for_ranks_undeclared", "Loads for one of several ranks, which it does not declare.", _ROOM,
           with_trainer(LoadsForAWorldUndeclared), change_spec=without_ranks),
    Mutant("no_device_for_any_rank", "Finds no device for a rank where ranks share one.", _ROOM,
           with_trainer(FindsNoDevice)),
    Mutant("spread_bytes_of_seven_bits", "Gathers a base as signed bytes.", _ROOM, with_rooms(gather=seven_bits)),
    Mutant("spread_bytes_as_bfloat16", "Gathers a spread base as bfloat16.", _ROOM, with_rooms(gather=quiet_numbers)),
    Mutant("last_part_of_a_spread_base_lost", "Leaves out what the third rank holds of the base.", _ROOM,
           with_rooms(gather=last_part_lost)),
)  # fmt: skip

MUTANTS = tuple(replace(mutant, case_seconds=_SECONDS) for mutant in _MUTANTS)
