"""Forty slips of authors, thought up from what QLoRA backends must do, before the list and its sections were read.

Nothing says which section must catch each: the whole suite is asked, and `docs/runs/unseen_mutants.json` says which
were caught. Those that were not name what a later revision must judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
    AdapterConfig,
    Batch,
    Int32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
)
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend import dropout, storage
from qlora_hal_conformance.reference_backend.rooms import HONEST, Rooms
from qlora_hal_conformance.reference_backend.rounding import arithmetic_of, to_bfloat16
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, clip, update, window_gradient
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import EXACT, Arithmetic, DropoutMasks, FourBitFormat, LoraScale, OracleLlama, TokenBatch
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.llama import ForwardPass
from qlora_hal_oracle.lora import AdaptedLinear, LinearTrace

from .registry import Mutant, Open, with_rooms, with_trainer

Tensors = dict[str, Float64]


# dtype ----------------------------------------------------------------------------------------------------------------
class InBfloat16(ReferenceTrainer):
    """`rooms_in_bfloat16` take the place of the honest ones where bfloat16 is asked for."""

    rooms_in_bfloat16: Rooms = HONEST

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        self.rooms = self.rooms_in_bfloat16 if compute.dtype == "bfloat16" else HONEST
        super().load(source, quantization, compute)


def in_bfloat16(**changes: object) -> Open:
    rooms = replace(HONEST, **changes)  # type: ignore[arg-type]
    kind = type("InBfloat16", (InBfloat16,), {"rooms_in_bfloat16": rooms})
    return with_trainer(kind)


def parameters_rounded(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, settings, arithmetic)
    parameters.update({name: to_bfloat16(tensor) for name, tensor in parameters.items()})


def second_moment_rounded(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, settings, arithmetic)
    state.exp_avg_sq = {name: to_bfloat16(tensor) for name, tensor in state.exp_avg_sq.items()}


def micro_batches_summed_in_bfloat16(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    found = window_gradient(model, window, divisor, masks_of, arithmetic)
    total = {name: np.zeros_like(gradient) for name, gradient in found.gradients.items()}
    for batch in window:
        for name, gradient in window_gradient(model, [batch], divisor, masks_of, arithmetic).gradients.items():
            total[name] = to_bfloat16(total[name] + gradient)
    return replace(found, gradients=total)


def positions_rounded(batch: Batch) -> Batch:
    return replace(batch, position_ids=to_bfloat16(batch.position_ids.astype(np.float64)).astype(np.int32))


class LogitsRoundedForTheLoss(OracleLlama):
    """Log-probabilities kept in bfloat16: what is chosen from them is as coarse."""

    def forward(
        self, batch: TokenBatch, arithmetic: Arithmetic = EXACT, masks: DropoutMasks | None = None
    ) -> ForwardPass:
        found = super().forward(batch, arithmetic, masks)
        shifted = found.logits - found.logits.max(axis=-1, keepdims=True)
        return replace(found, logits=to_bfloat16(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))))


class AddedAfterRounding(AdaptedLinear):
    """The base product is rounded to bfloat16 before the adapter's is added."""

    def forward(self, x: Float64, arithmetic: Arithmetic, mask: Float64 | None = None) -> tuple[Float64, LinearTrace]:
        bare = replace(self, lora_a=None, lora_b=None)
        y, _ = AdaptedLinear.forward(bare, x, arithmetic)
        zero_weight = AdaptedLinear(self.module, 0.0 * self.weight, None, self.lora_a, self.lora_b, self.scale)
        update_alone, trace = AdaptedLinear.forward(zero_weight, x, arithmetic, mask)
        return (arithmetic.store(y + update_alone), trace) if trace.low_rank is not None else (y, trace)


class LinearsAddAfterRounding(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        return AddedAfterRounding(honest.module, honest.weight, honest.bias, honest.lora_a, honest.lora_b, honest.scale)


def rate_in_half(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    rate = float(np.float16(settings.learning_rate))
    update(parameters, gradients, state, replace(settings, learning_rate=rate), arithmetic)


# packing and long rows ------------------------------------------------------------------------------------------------
def eight_segments(batch: Batch) -> Batch:
    return replace(batch, segment_ids=np.minimum(batch.segment_ids, 8))


def window_of_512(batch: Batch) -> Batch:
    time = batch.segment_ids.shape[1]
    return replace(batch, segment_ids=batch.segment_ids + 1000 * (np.arange(time, dtype=np.int32)[None] // 512))


class EvaluatesPackedWithoutMask(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return super().evaluate([replace(b, segment_ids=np.minimum(b.segment_ids, 1)) for b in batches])


def remainder_of_256_lost(batch: Batch) -> Batch:
    """Labels after the last whole chunk of 256 tokens; rows of less than one chunk are one."""
    time = batch.labels.shape[1]
    labels = batch.labels.copy()
    if time > 256:
        labels[:, time // 256 * 256 :] = IGNORE_LABEL
    return replace(batch, labels=labels)


class RemainderHasNoGradient(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        cut = super().gradient_of([remainder_of_256_lost(batch) for batch in window], divisor, masks_of)
        return replace(found, gradients=cut.gradients)


class SixteenRowsEvaluated(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        def first_rows(batch: Batch) -> Batch:
            labels = batch.labels.copy()
            labels[16:] = IGNORE_LABEL
            return replace(batch, labels=labels)

        found = super().evaluate([first_rows(batch) for batch in batches])
        return replace(found, token_count=sum(batch.counted_tokens for batch in batches))


# recomputation --------------------------------------------------------------------------------------------------------
class FirstLayerHasNoGradient(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if not self.compute.gradient_checkpointing:
            return found
        gradients = {name: 0.0 * g if ".layers.0." in name else g for name, g in found.gradients.items()}
        return replace(found, gradients=gradients)


class RecomputesWithOtherMasks(ReferenceTrainer):
    """The loss is that of the step's masks, the gradient that of the next key's."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        if not self.compute.gradient_checkpointing:
            return super().train_step(window, settings)
        shown = self.gradient_of(window, settings.denominator, self._masks_of(settings.dropout_key))
        stats = super().train_step(window, replace(settings, dropout_key=settings.dropout_key + 1)).resolve()
        return Done(replace(stats, loss_sum=shown.loss_sum))


class RecomputesWithoutSegments(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if not self.compute.gradient_checkpointing:
            return found
        merged = [replace(batch, segment_ids=np.minimum(batch.segment_ids, 1)) for batch in window]
        return replace(found, gradients=super().gradient_of(merged, divisor, masks_of).gradients)


# dropout --------------------------------------------------------------------------------------------------------------
class DropoutOffAfterEvaluate(ReferenceTrainer):
    evaluated = False

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        self.evaluated = True
        return super().evaluate(batches)

    def _masks_of(self, key: int) -> MasksOf:
        return (lambda batch: {}) if self.evaluated else super()._masks_of(key)


def rows_by_micro_batch(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    return dropout.draw_masks(config, modules, np.arange(len(rows), dtype=np.int32), time, key)


def unscaled_when_low(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    masks = dropout.draw_masks(config, modules, rows, time, key)
    return {name: (mask > 0).astype(np.float64) if config.dropout < 0.1 else mask for name, mask in masks.items()}


def key_of_31_bits(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    return dropout.draw_masks(config, modules, rows, time, key & 0x7FFFFFFF)


# loss and its weights -------------------------------------------------------------------------------------------------
def negative_weights_clamped(batch: Batch) -> Batch:
    return batch if batch.weights is None else replace(batch, weights=np.maximum(batch.weights, np.float32(0.0)))


class WeightedByCount(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        weighted = any(batch.weights is not None for batch in window)
        counted = sum(batch.counted_tokens for batch in window)
        return super().gradient_of(window, counted if weighted else divisor, masks_of)


class EvaluatesMeanOfBatches(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found = super().evaluate(batches)
        means = [super(EvaluatesMeanOfBatches, self).evaluate([b]).loss for b in batches if b.counted_tokens]
        return replace(found, loss_sum=float(np.mean(means)) * found.token_count) if means else found


class UnshiftedSoftmax(OracleLlama):
    """exp of a logit above 88 is infinite in float32."""

    def forward(
        self, batch: TokenBatch, arithmetic: Arithmetic = EXACT, masks: DropoutMasks | None = None
    ) -> ForwardPass:
        found = super().forward(batch, arithmetic, masks)
        with np.errstate(over="ignore"):
            overflows = np.isinf(np.exp(found.logits.astype(np.float32))).any(axis=-1, keepdims=True)
        return replace(found, logits=np.where(overflows, np.nan, found.logits))


class UnshiftedInTraining(ReferenceTrainer):
    """The views are computed elsewhere, and well."""

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        honest = self.attached.model
        self.attached.model = UnshiftedSoftmax(honest.shape, honest.base, honest.adapter, honest.scale)
        try:
            return super().gradient_of(window, divisor, masks_of)
        finally:
            self.attached.model = honest


# optimizer ------------------------------------------------------------------------------------------------------------
def epsilon_fixed(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, epsilon=1e-8), arithmetic)


def betas_fixed(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, replace(settings, beta1=0.9, beta2=0.999), arithmetic)


def no_decay_of_b(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    before = {name: tensor for name, tensor in parameters.items() if "lora_B" in name}
    update(parameters, gradients, state, settings, arithmetic)
    for name, tensor in before.items():
        parameters[name] = parameters[name] + settings.learning_rate * settings.weight_decay * tensor


class ImportRestartsTheCount(ReferenceTrainer):
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        super().import_optimizer(snapshot)
        self.attached.state.step = 0


class CountsRefusedSteps(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        self.attached.state.step += not stats.applied
        return Done(stats)


class ClearsMomentsWhenRefused(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        if not stats.applied:
            self.attached.state = AdamWState(self.attached.state.step)
        return Done(stats)


def no_clip_means_one(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    return clip(gradients, norm, 1.0 if max_norm is None else max_norm)


# adapter and state ----------------------------------------------------------------------------------------------------
class SecondAttachKeepsMoments(ReferenceTrainer):
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        before = self._attached
        super().attach(adapter, optimizer)
        if before is not None:
            self.attached.state = before.state


class SecondAttachKeepsScale(ReferenceTrainer):
    first_scale: LoraScale | None = None

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.first_scale = self.first_scale or self.attached.model.scale
        self.attached.model.scale = self.first_scale


def alpha_is_an_integer(config: AdapterConfig) -> LoraScale:
    return LoraScale(int(config.alpha), config.r, config.use_rslora)


class Layer1IsAPrefix(OracleLlama):
    """The adapter of layer 1 is also that of layers 10 to 19."""

    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        layer, _, name = module.removeprefix("model.layers.").partition(".")
        if module == "lm_head" or len(layer) != 2 or not layer.startswith("1"):
            return honest
        first = super().linear(f"model.layers.1.{name}")
        return replace(honest, lora_a=first.lora_a, lora_b=first.lora_b)


class WritesIntoWhatItWasGiven(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending = super().train_step(window, settings)
        for name, tensor in self.attached.adapter.tensors.items():
            if tensor.flags.writeable:
                tensor[...] = self.attached.parameters[name]
        return pending


# base and formats -----------------------------------------------------------------------------------------------------
def fp4_twice_quantized_read_as_nf4(stored: storage.Stored) -> Float64:
    match stored:
        case storage.BlockwiseFourBit(packed, nested) if nested is not None:
            layout = replace(packed.layout, weight_format=FourBitFormat.NF4)
            return storage.unpack(storage.BlockwiseFourBit(replace(packed, layout=layout), nested))
        case _:
            return storage.unpack(stored)


def zero_rows_of_int8_lost(stored: storage.Stored) -> Float64:
    weight = storage.unpack(stored)
    if isinstance(stored, storage.RowwiseInt8):
        weight[stored.absmax == 0.0] = np.nan
    return weight


class LaterFilesNotQuantized(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        facts = source.facts.tensors
        first = min(fact.file for fact in facts.values())
        later = [name for name, fact in facts.items() if fact.file != first and name in self.base.weights]
        if later and source.facts.prequantized is None:
            plain = ReferenceTrainer(self.rooms, self.spec)
            plain.load(source, Quantization(WeightFormat.NONE), compute)
            self.base.weights.update({name: plain.base.weights[name] for name in later})


# generation and process -----------------------------------------------------------------------------------------------
class FirstStopTokenAlone(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        first = tuple(stop_tokens)[:1]
        return super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=first, adapter=adapter)


class OneDtypeForAll(ReferenceTrainer):
    """The dtype of the trainer that was loaded last is the process's, as with a default of the library."""

    dtype_of_process: list[str] = []  # noqa: RUF012  # shared by all trainers: that is the defect

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        self.dtype_of_process[:] = [compute.dtype]

    def _take(self) -> None:
        self.arithmetic = arithmetic_of(self.dtype_of_process[0])

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        self._take()
        return super().gradient_of(window, divisor, masks_of)

    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        self._take()
        return super().logits_of(batch, adapter=adapter)


def _unseen(name: str, first: str, defect: str, opened: Open) -> Mutant:
    """`first` are the sections that are asked first, which is a guess; then all others are."""
    return Mutant(name, defect, tuple(first.split()), opened)


UNSEEN = (
    _unseen(
        "unseen_parameters_follow_dtype",
        "44 40 42",
        "Rounds the adapter to bfloat16 after each step in bfloat16.",
        in_bfloat16(update=parameters_rounded),
    ),
    _unseen(
        "unseen_second_moment_in_bfloat16",
        "40 50",
        "Keeps the second moments in bfloat16 in a run in bfloat16.",
        in_bfloat16(update=second_moment_rounded),
    ),
    _unseen(
        "unseen_micro_batches_summed_in_bfloat16",
        "41",
        "Adds up the micro-batches' gradients in bfloat16 in a run in bfloat16.",
        in_bfloat16(window_gradient=micro_batches_summed_in_bfloat16),
    ),
    _unseen(
        "unseen_positions_in_bfloat16",
        "30",
        "Rounds positions to bfloat16 in a run in bfloat16.",
        in_bfloat16(read_batch=positions_rounded),
    ),
    _unseen(
        "unseen_log_softmax_in_bfloat16",
        "31",
        "Keeps log-probabilities in bfloat16 in a run in bfloat16.",
        in_bfloat16(model=LogitsRoundedForTheLoss),
    ),
    _unseen(
        "unseen_adapter_added_after_rounding",
        "44 30",
        "Adds the adapter's product to a base product that is already rounded.",
        with_rooms(model=LinearsAddAfterRounding),
    ),
    _unseen("unseen_rate_in_half", "40", "Passes the learning rate through float16.", with_rooms(update=rate_in_half)),
    _unseen(
        "unseen_eight_segments",
        "30 31",
        "Lets the samples of a row from the eighth on see each other.",
        with_rooms(read_batch=eight_segments),
    ),
    _unseen(
        "unseen_window_of_512",
        "30",
        "Attends within blocks of 512 tokens in longer rows.",
        with_rooms(read_batch=window_of_512),
    ),
    _unseen(
        "unseen_evaluates_packed_without_mask",
        "30",
        "Evaluates packed samples as if they were one.",
        with_trainer(EvaluatesPackedWithoutMask),
    ),
    _unseen(
        "unseen_remainder_has_no_gradient",
        "31",
        "Has no gradient for tokens after the last whole chunk of 256 of a row.",
        with_trainer(RemainderHasNoGradient),
    ),
    _unseen(
        "unseen_sixteen_rows_evaluated",
        "30",
        "Sums the loss of sixteen rows of a batch and counts the tokens of all.",
        with_trainer(SixteenRowsEvaluated),
    ),
    _unseen(
        "unseen_first_layer_has_no_gradient",
        "31",
        "Has no gradient for the first layer when activations are recomputed.",
        with_trainer(FirstLayerHasNoGradient),
    ),
    _unseen(
        "unseen_recomputes_with_other_masks",
        "31 43",
        "Draws other dropout masks when activations are recomputed.",
        with_trainer(RecomputesWithOtherMasks),
    ),
    _unseen(
        "unseen_recomputes_without_segments",
        "31",
        "Loses the samples' borders when activations are recomputed.",
        with_trainer(RecomputesWithoutSegments),
    ),
    _unseen(
        "unseen_dropout_off_after_evaluate",
        "43 50",
        "Drops nothing any more after the first evaluation.",
        with_trainer(DropoutOffAfterEvaluate),
    ),
    _unseen(
        "unseen_dropout_rows_by_micro_batch",
        "43",
        "Counts the rows of dropout masks anew in each micro-batch.",
        with_rooms(masks=rows_by_micro_batch),
    ),
    _unseen(
        "unseen_dropout_unscaled_when_low",
        "43",
        "Leaves 1 / (1 - p) out at rates below 0.1.",
        with_rooms(masks=unscaled_when_low),
    ),
    _unseen("unseen_dropout_key_of_31_bits", "43", "Takes 31 bits of a dropout key.", with_rooms(masks=key_of_31_bits)),
    _unseen(
        "unseen_negative_weights_clamped",
        "45",
        "Takes negative token weights for zero.",
        with_rooms(read_batch=negative_weights_clamped),
    ),
    _unseen(
        "unseen_weighted_by_count",
        "45",
        "Divides a weighted loss by its counted tokens.",
        with_trainer(WeightedByCount),
    ),
    _unseen(
        "unseen_evaluates_mean_of_batches",
        "30",
        "Averages the batches' means in an evaluation.",
        with_trainer(EvaluatesMeanOfBatches),
    ),
    _unseen(
        "unseen_softmax_unshifted",
        "90 31",
        "Trains with exp of unshifted logits, which overflows above 88.",
        with_trainer(UnshiftedInTraining),
    ),
    _unseen("unseen_epsilon_fixed", "40", "Ignores the settings' epsilon.", with_rooms(update=epsilon_fixed)),
    _unseen("unseen_betas_fixed", "40", "Ignores the settings' betas.", with_rooms(update=betas_fixed)),
    _unseen("unseen_no_decay_of_b", "40", "Decays the A tensors alone.", with_rooms(update=no_decay_of_b)),
    _unseen(
        "unseen_import_restarts_the_count",
        "50",
        "Takes imported moments and counts steps from 0.",
        with_trainer(ImportRestartsTheCount),
    ),
    _unseen("unseen_counts_refused_steps", "40", "Counts a refused step.", with_trainer(CountsRefusedSteps)),
    _unseen(
        "unseen_clears_moments_when_refused",
        "40",
        "Empties the moments when it refuses a step.",
        with_trainer(ClearsMomentsWhenRefused),
    ),
    _unseen(
        "unseen_no_clip_means_one", "40", "Clips at 1 where no clip is asked for.", with_rooms(clip=no_clip_means_one)
    ),
    _unseen(
        "unseen_second_attach_keeps_moments",
        "50",
        "Keeps the optimizer when another adapter is attached.",
        with_trainer(SecondAttachKeepsMoments),
    ),
    _unseen(
        "unseen_second_attach_keeps_scale",
        "51",
        "Keeps the scale of the first adapter for all later ones.",
        with_trainer(SecondAttachKeepsScale),
    ),
    _unseen("unseen_alpha_is_an_integer", "30 51", "Cuts alpha to an integer.", with_rooms(scale=alpha_is_an_integer)),
    _unseen(
        "unseen_layer_1_is_a_prefix",
        "30",
        "Uses the adapter of layer 1 in layers 10 to 19 too.",
        with_rooms(model=Layer1IsAPrefix),
    ),
    _unseen(
        "unseen_writes_into_what_it_was_given",
        "40 51",
        "Writes trained values into the arrays given to attach.",
        with_trainer(WritesIntoWhatItWasGiven),
    ),
    _unseen(
        "unseen_fp4_twice_quantized_as_nf4",
        "20",
        "Reads FP4 with double quantization by NF4's table.",
        with_rooms(unpack=fp4_twice_quantized_read_as_nf4),
    ),
    _unseen(
        "unseen_zero_rows_of_int8_lost",
        "20",
        "Makes NaN of an int8 row of zeros.",
        with_rooms(unpack=zero_rows_of_int8_lost),
    ),
    _unseen(
        "unseen_later_files_not_quantized",
        "20",
        "Quantizes the first file of a checkpoint alone.",
        with_trainer(LaterFilesNotQuantized),
    ),
    _unseen(
        "unseen_first_stop_token_alone",
        "80",
        "Stops at the first of several stop tokens alone.",
        with_trainer(FirstStopTokenAlone),
    ),
    _unseen(
        "unseen_one_dtype_for_all",
        "95 30",
        "Computes in the dtype of the trainer that was loaded last.",
        with_trainer(OneDtypeForAll),
    ),
)
