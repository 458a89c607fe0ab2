"""Right on small inputs, wrong past a size: more rows, longer rows, more layers, more tokens, later steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Quantization
from qlora_hal.contract.values import IGNORE_LABEL, AdapterConfig, Batch, Int32, LinearShape, LossSum, StepSettings
from qlora_hal_conformance.reference_backend.dropout import draw_masks
from qlora_hal_conformance.reference_backend.rooms import HONEST
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, clip, update, window_gradient
from qlora_hal_conformance.reference_backend.storage import Plain, Stored, pack
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, DropoutMasks, OracleLlama
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.arrays import AnyFloat, Float64
from qlora_hal_oracle.lora import AdaptedLinear

from .registry import Mutant, with_rooms, with_trainer

Tensors = dict[str, Float64]


# what is read of a batch ----------------------------------------------------------------------------------------------
def positions_of_four_rows(batch: Batch) -> Batch:
    position_ids = batch.position_ids.copy()
    position_ids[4:] = 0
    return replace(batch, position_ids=position_ids)


def positions_end_at_511(batch: Batch) -> Batch:
    return replace(batch, position_ids=np.minimum(batch.position_ids, 511))


def positions_in_bfloat16(batch: Batch) -> Batch:
    """Eight bits: exact up to 256, then even numbers only, then every fourth."""
    scale = np.maximum(1, 2 ** (np.ceil(np.log2(np.maximum(batch.position_ids, 1) + 1)) - 8)).astype(np.int32)
    return replace(batch, position_ids=batch.position_ids // scale * scale)


def labels_end_at_512(batch: Batch) -> Batch:
    labels = batch.labels.copy()
    labels[:, 512:] = IGNORE_LABEL
    return replace(batch, labels=labels)


def label_of_pad_dropped(batch: Batch) -> Batch:
    return replace(batch, labels=np.where(batch.labels == 0, IGNORE_LABEL, batch.labels).astype(np.int32))


def padding_told_by_its_id(batch: Batch) -> Batch:
    return replace(batch, segment_ids=np.where(batch.input_ids == 0, 0, batch.segment_ids).astype(np.int32))


def ids_of_15_bits(batch: Batch) -> Batch:
    return replace(batch, input_ids=batch.input_ids & 0x7FFF)


# the model ------------------------------------------------------------------------------------------------------------
class WideHeadsScaled(OracleLlama):
    """Doubles the queries of heads of 128, as a kernel does that knows the scale of 32 by heart."""

    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        if self.shape.head_dim < 128 or not module.endswith("q_proj"):
            return honest
        lora_b = None if honest.lora_b is None else 2.0 * honest.lora_b
        return replace(honest, weight=2.0 * honest.weight, lora_b=lora_b)


class LayersAfterTheSecondKeepTheirAdapterOut(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        first_two = module.startswith(("model.layers.0.", "model.layers.1."))
        return honest if first_two else replace(honest, lora_a=None, lora_b=None)


class TwoLayersPacked:
    """Packs the linear layers of two decoder layers, seven to each."""

    def __init__(self) -> None:
        self._packed = 0

    def __call__(self, weight: AnyFloat, quantization: Quantization) -> Stored:
        self._packed += 1
        return pack(weight, quantization) if self._packed <= 14 else Plain(np.array(weight, dtype=np.float32))


def open_with_two_layers_packed(spec: BackendSpec) -> ReferenceTrainer:
    return ReferenceTrainer(replace(HONEST, pack=TwoLayersPacked()), spec)


# the step -------------------------------------------------------------------------------------------------------------
def first_eight_micro_batches(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    return window_gradient(model, window[:8], divisor, masks_of, arithmetic)


def clip_of_more_than_one_ignored(gradients: Tensors, norm: float, max_norm: float | None) -> Tensors:
    return clip(gradients, norm, None if max_norm is not None and max_norm > 1.0 else max_norm)


def decay_lost_at_low_rates(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    decay = settings.weight_decay if settings.learning_rate >= 1e-3 else 0.0
    update(parameters, gradients, state, replace(settings, weight_decay=decay), arithmetic)


def bias_correction_of_the_hundredth_step(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """From the hundredth step on, as a table of a hundred entries would."""
    true_step, state.step = state.step, min(state.step, 99)
    update(parameters, gradients, state, settings, arithmetic)
    state.step = true_step + 1


class FourBatchesEvaluated(ReferenceTrainer):
    """Counts the tokens of all batches and sums the losses of four."""

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found, tokens = super().evaluate(batches[:4]), sum(batch.counted_tokens for batch in batches)
        return LossSum(found.loss_sum, tokens)


# dropout --------------------------------------------------------------------------------------------------------------
def one_mask_to_all_rows(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    masks = draw_masks(config, modules, rows, time, key)
    return {module: np.broadcast_to(mask[:1], mask.shape) for module, mask in masks.items()}


def one_mask_to_all_positions(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    masks = draw_masks(config, modules, rows, time, key)
    return {module: np.broadcast_to(mask[:, :1], mask.shape) for module, mask in masks.items()}


def no_mask_from_the_eighth_position_on(
    config: AdapterConfig, modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> DropoutMasks:
    masks = draw_masks(config, modules, rows, time, key)
    for mask in masks.values():
        mask[:, 8:] = 1.0
    return masks


MUTANTS = (
    Mutant(
        "positions_of_four_rows",
        "Puts every token of the rows after the fourth at position 0.",
        ("30", "31"),
        with_rooms(read_batch=positions_of_four_rows),
    ),
    Mutant(
        "positions_end_at_511",
        "Gives every token past the 512th the same position.",
        ("30", "31"),
        with_rooms(read_batch=positions_end_at_511),
    ),
    Mutant(
        "positions_in_bfloat16",
        "Rounds positions to the eight bits of bfloat16.",
        ("30", "31"),
        with_rooms(read_batch=positions_in_bfloat16),
    ),
    Mutant(
        "labels_end_at_512",
        "Trains no label past the 512th token.",
        ("31",),
        with_rooms(read_batch=labels_end_at_512),
    ),
    Mutant(
        "label_of_pad_dropped",
        "Never trains token 0, in the middle of a text either.",
        ("31",),
        with_rooms(read_batch=label_of_pad_dropped),
    ),
    Mutant(
        "padding_told_by_its_id",
        "Takes every token 0 for padding, in the middle of a text too.",
        ("30", "31"),
        with_rooms(read_batch=padding_told_by_its_id),
    ),
    Mutant(
        "ids_of_15_bits",
        "Keeps 15 bits of a token id.",
        ("30", "31"),
        with_rooms(read_batch=ids_of_15_bits),
    ),
    Mutant(
        "wide_heads_scaled",
        "Doubles the attention scores of heads of 128.",
        ("30", "31"),
        with_rooms(model=WideHeadsScaled),
    ),
    Mutant(
        "adapter_of_two_layers",
        "Leaves the adapter out of every layer after the second.",
        ("30", "31"),
        with_rooms(model=LayersAfterTheSecondKeepTheirAdapterOut),
    ),
    Mutant(
        "two_layers_quantized",
        "Keeps every layer after the second in full precision.",
        ("20",),
        open_with_two_layers_packed,
    ),
    Mutant(
        "first_eight_micro_batches",
        "Drops every micro-batch of a window after the eighth.",
        ("41",),
        with_rooms(window_gradient=first_eight_micro_batches),
    ),
    Mutant(
        "clip_of_more_than_one_ignored",
        "Does not clip where max_grad_norm is more than 1.",
        ("40",),
        with_rooms(clip=clip_of_more_than_one_ignored),
    ),
    Mutant(
        "decay_lost_at_low_rates",
        "Leaves weight decay out at learning rates below 0.001.",
        ("40",),
        with_rooms(update=decay_lost_at_low_rates),
    ),
    Mutant(
        "bias_correction_of_the_hundredth_step",
        "Corrects the bias of every later step as that of the hundredth.",
        ("50",),
        with_rooms(update=bias_correction_of_the_hundredth_step),
    ),
    Mutant(
        "four_batches_evaluated",
        "Sums the loss of the first four batches and divides by the tokens of all.",
        ("30",),
        with_trainer(FourBatchesEvaluated),
    ),
    Mutant(
        "one_mask_to_all_rows",
        "Draws one dropout mask for all rows of a batch.",
        ("43",),
        with_rooms(masks=one_mask_to_all_rows),
    ),
    Mutant(
        "one_mask_to_all_positions",
        "Draws one dropout mask for all tokens of a row.",
        ("43",),
        with_rooms(masks=one_mask_to_all_positions),
    ),
    Mutant(
        "no_mask_from_the_eighth_position_on",
        "Drops nothing from the eighth token of a row on.",
        ("43",),
        with_rooms(masks=no_mask_from_the_eighth_position_on),
    ),
)
