"""Right in float32, unpacked, kept and in one file; wrong where two of these come together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.values import IGNORE_LABEL, AdapterConfig, Batch, Float32, Int32, LossSum, StepSettings
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.rooms import HONEST, scale_of
from qlora_hal_conformance.reference_backend.rounding import to_bfloat16
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, update, window_gradient
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, LoraScale, OracleLlama
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.random_models import EMBEDDING

from .forward import samples_see_each_other
from .loss import eos_never_trained, mean_of_means
from .registry import Mutant, Open, with_rooms, with_trainer
from .training import default_betas, never_clip, no_bias_correction, no_decay, unscaled_masks

Tensors = dict[str, Float64]


# in one dtype ---------------------------------------------------------------------------------------------------------
class WrongInBfloat16(ReferenceTrainer):
    """Some rooms are wrong, in bfloat16 alone."""

    def __init__(self, changes: dict[str, object], spec: BackendSpec) -> None:
        super().__init__(HONEST, spec)
        self._changes = changes

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        wrong = compute.dtype == "bfloat16"
        self.rooms = replace(HONEST, **self._changes) if wrong else HONEST  # type: ignore[arg-type]
        super().load(source, quantization, compute)


def in_bfloat16(**changes: object) -> Open:
    return lambda spec: WrongInBfloat16(changes, spec)


def packing_lost(batch: Batch) -> Batch:
    return samples_see_each_other(batch) if batch.is_packed else batch


def positions_of_eight_rows(batch: Batch) -> Batch:
    position_ids = batch.position_ids.copy()
    position_ids[8:] = 0
    return replace(batch, position_ids=position_ids)


def labels_end_at_512(batch: Batch) -> Batch:
    labels = batch.labels.copy()
    labels[:, 512:] = IGNORE_LABEL
    return replace(batch, labels=labels)


def summed_in_bfloat16(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    whole = window_gradient(model, window, divisor, masks_of, arithmetic)
    total: Tensors = {}
    for batch in window:
        for name, gradient in window_gradient(model, [batch], divisor, masks_of, arithmetic).gradients.items():
            total[name] = to_bfloat16(total[name] + gradient) if name in total else gradient
    return replace(whole, gradients=total)


def bfloat16_moments(
    parameters: Tensors, gradients: Tensors, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    update(parameters, gradients, state, settings, arithmetic)
    for held in (state.exp_avg, state.exp_avg_sq):
        held.update({name: to_bfloat16(tensor) for name, tensor in held.items()})


# packing --------------------------------------------------------------------------------------------------------------
def mask_of_eight_samples(batch: Batch) -> Batch:
    return replace(batch, segment_ids=np.minimum(batch.segment_ids, 9))


def samples_of_the_first_row(batch: Batch) -> Batch:
    """Every row is cut where the first is."""
    if not batch.is_packed:
        return batch
    of_first = np.maximum(batch.segment_ids[:1], 1)
    return replace(batch, segment_ids=np.where(batch.segment_ids > 0, of_first, 0).astype(np.int32))


def samples_begin_one_token_early(batch: Batch) -> Batch:
    """Lengths of samples summed up wrongly by one: the last token of a sample belongs to the next."""
    segments = batch.segment_ids.copy()
    ends = (segments[:, 1:] > segments[:, :-1]) & (segments[:, :-1] > 0)
    segments[:, :-1] = np.where(ends, segments[:, 1:], segments[:, :-1])
    return replace(batch, segment_ids=segments)


def packing_lost_beyond(time: int) -> Callable[[Batch], Batch]:
    return lambda batch: packing_lost(batch) if batch.input_ids.shape[1] > time else batch


class PackingLostInEvaluation(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return super().evaluate([packing_lost(batch) for batch in batches])


class PackingLostWithDropout(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        drops = self.attached.adapter.config.dropout > 0.0
        return super().gradient_of([packing_lost(b) for b in window] if drops else window, divisor, masks_of)


# recomputation --------------------------------------------------------------------------------------------------------
class PackingLostInRecomputation(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        recomputes = self.compute.gradient_checkpointing
        return super().gradient_of([packing_lost(b) for b in window] if recomputes else window, divisor, masks_of)


class LongRowsCutInRecomputation(ReferenceTrainer):
    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        recomputes = self.compute.gradient_checkpointing
        return super().gradient_of([labels_end_at_512(b) for b in window] if recomputes else window, divisor, masks_of)


class OtherMasksInRecomputation(ReferenceTrainer):
    def _masks_of(self, key: int) -> MasksOf:
        return super()._masks_of(key + 1 if self.compute.gradient_checkpointing else key)


class ScaleForgottenInRecomputation(ReferenceTrainer):
    """In bfloat16 alone: the second forward pass adds B A x without alpha / r."""

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        model = self.attached.model
        if not self.compute.gradient_checkpointing or self.compute.dtype != "bfloat16":
            return super().gradient_of(window, divisor, masks_of)
        model.scale, kept = LoraScale(alpha=1.0, rank=1), model.scale
        try:
            return super().gradient_of(window, divisor, masks_of)
        finally:
            model.scale = kept


class RecomputationEvaluatesTheBase(ReferenceTrainer):
    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        return super().logits_of(batch, adapter=adapter and not self.compute.gradient_checkpointing)


class RecomputationGeneratesFromTheLastToken(ReferenceTrainer):
    """Where activations are recomputed no cache of keys is kept, and each new token sees the one before it alone."""

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        seen = prompt[-1:] if self.compute.gradient_checkpointing else prompt
        return super().generate(seen, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)


# products -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Loading:
    """What a base is loaded from, and how."""

    source: ModelSource
    quantization: Quantization
    compute: Compute


Distort = Callable[[str, Float64, Loading], Float64]
"""A weight by its name as the products see it."""


class ProductsOfOtherWeights(ReferenceTrainer):
    """Shows the right weights and multiplies by others."""

    def __init__(self, distort: Distort, spec: BackendSpec) -> None:
        super().__init__(HONEST, spec)
        self._distort = distort
        self._shown: Tensors = {}

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        self._shown, loading = dict(self.base.weights), Loading(source, quantization, compute)
        self.base.weights.update({name: self._distort(name, w, loading) for name, w in self._shown.items()})

    def dequantized_weight(self, module: str) -> Float32:
        super().dequantized_weight(module)  # raises for an unknown module
        return self._shown[f"{module}.weight"].astype(np.float32)


def multiplying_by(distort: Distort) -> Open:
    return lambda spec: ProductsOfOtherWeights(distort, spec)


def rows_shifted_where(condition: Callable[[Loading], bool]) -> Distort:
    def distort(name: str, weight: Float64, loading: Loading) -> Float64:
        return np.roll(weight, 1, axis=0) if name.endswith("down_proj.weight") and condition(loading) else weight

    return distort


def embedding_of_the_first_file(name: str, weight: Float64, loading: Loading) -> Float64:
    tensors = loading.source.facts.tensors
    first = min(facts.file for facts in tensors.values())
    return weight if name != EMBEDDING or tensors[name].file == first else 0.0 * weight


def norms_of_three_bits(name: str, weight: Float64, loading: Loading) -> Float64:
    """A norm that is stored in 16 bits comes in with three of them."""
    half = name.endswith("norm.weight") and loading.source.facts.tensors[name].dtype != "F32"
    return np.round(weight * 4.0) / 4.0 if half else weight


def rank_stabilized_at_8_only(config: AdapterConfig) -> LoraScale:
    return scale_of(config) if config.r == 8 else LoraScale(config.alpha, config.r)


def rank_stabilized_by_root_8(config: AdapterConfig) -> LoraScale:
    return LoraScale(config.alpha, 8, rank_stabilized=True) if config.use_rslora else scale_of(config)


MUTANTS = (
    Mutant(
        "double_quant_wrong_in_products",
        "Multiplies by other rows than it shows, with double quantization alone.",
        ("20",),
        multiplying_by(rows_shifted_where(lambda loading: loading.quantization.double_quant)),
    ),
    Mutant(
        "block_128_wrong_in_products",
        "Multiplies by other rows than it shows, in blocks of 128 alone.",
        ("20",),
        multiplying_by(rows_shifted_where(lambda loading: loading.quantization.block_size == 128)),
    ),
    Mutant(
        "packed_checkpoint_wrong_in_products",
        "Multiplies by other rows than it shows, of a checkpoint that was quantized before.",
        ("20",),
        multiplying_by(rows_shifted_where(lambda loading: loading.source.facts.prequantized is not None)),
    ),
    Mutant(
        "embedding_of_the_first_file",
        "Reads the embedding from the first file, and zeros where it is in another.",
        ("20",),
        multiplying_by(embedding_of_the_first_file),
    ),
    Mutant(
        "half_precision_norms_of_three_bits",
        "Loses most bits of norms that are stored in half precision.",
        ("20",),
        multiplying_by(norms_of_three_bits),
    ),
    Mutant(
        "rank_stabilized_at_rank_8_only",
        "Scales by alpha / sqrt(r) at rank 8, by alpha / r at any other.",
        ("30", "31"),
        with_rooms(scale=rank_stabilized_at_8_only),
    ),
    Mutant(
        "rank_stabilized_by_the_root_of_8",
        "Scales by alpha / sqrt(8) at any rank.",
        ("30", "31"),
        with_rooms(scale=rank_stabilized_by_root_8),
    ),
    Mutant(
        "packed_mask_of_eight_samples",
        "Lets the samples of a row after the eighth see each other.",
        ("30", "31"),
        with_rooms(read_batch=mask_of_eight_samples),
    ),
    Mutant(
        "sample_sees_its_neighbours_last_token",
        "Begins each packed sample at the last token of the one before it.",
        ("30", "31"),
        with_rooms(read_batch=samples_begin_one_token_early),
    ),
    Mutant(
        "packed_as_the_first_row",
        "Cuts every packed row where the first one is cut.",
        ("30", "31"),
        with_rooms(read_batch=samples_of_the_first_row),
    ),
    Mutant(
        "packing_lost_beyond_512",
        "Lets packed samples see each other in rows of more than 512 tokens.",
        ("30", "31"),
        with_rooms(read_batch=packing_lost_beyond(512)),
    ),
    Mutant(
        "packing_lost_beyond_1024",
        "Lets packed samples see each other in rows of more than 1024 tokens.",
        ("30", "31"),
        with_rooms(read_batch=packing_lost_beyond(1024)),
    ),
    Mutant(
        "packing_lost_in_evaluation",
        "Lets packed samples see each other in evaluate alone.",
        ("30",),
        with_trainer(PackingLostInEvaluation),
    ),
    Mutant(
        "packing_lost_with_dropout",
        "Lets packed samples see each other where adapter inputs are dropped.",
        ("31",),
        with_trainer(PackingLostWithDropout),
    ),
    Mutant(
        "packing_lost_in_recomputation",
        "Lets packed samples see each other where activations are recomputed.",
        ("31",),
        with_trainer(PackingLostInRecomputation),
    ),
    Mutant(
        "long_rows_cut_in_recomputation",
        "Trains no label past the 512th token where activations are recomputed.",
        ("31",),
        with_trainer(LongRowsCutInRecomputation),
    ),
    Mutant(
        "other_masks_in_recomputation",
        "Drops other adapter inputs where activations are recomputed.",
        ("31",),
        with_trainer(OtherMasksInRecomputation),
    ),
    Mutant(
        "scale_forgotten_in_recomputation",
        "Recomputes without alpha / r, in bfloat16 alone.",
        ("31",),
        with_trainer(ScaleForgottenInRecomputation),
    ),
    Mutant(
        "recomputation_evaluates_the_base",
        "Evaluates without the adapter where activations are recomputed.",
        ("30",),
        with_trainer(RecomputationEvaluatesTheBase),
    ),
    Mutant(
        "recomputation_generates_from_the_last_token",
        "Generates from the prompt's last token alone where activations are recomputed.",
        ("31",),
        with_trainer(RecomputationGeneratesFromTheLastToken),
    ),
    Mutant(
        "bfloat16_loses_packing",
        "Lets packed samples see each other in bfloat16 alone.",
        ("30", "31"),
        in_bfloat16(read_batch=packing_lost),
    ),
    Mutant(
        "bfloat16_loses_positions_of_many_rows",
        "Puts every token of the rows after the eighth at position 0, in bfloat16 alone.",
        ("30", "31"),
        in_bfloat16(read_batch=positions_of_eight_rows),
    ),
    Mutant(
        "bfloat16_cuts_long_rows",
        "Trains no label past the 512th token in bfloat16 alone.",
        ("31",),
        in_bfloat16(read_batch=labels_end_at_512),
        may_fail=("30",),
    ),
    Mutant(
        "bfloat16_never_trains_the_end",
        "Leaves the end-of-sequence token out of the loss in bfloat16 alone.",
        ("31",),
        in_bfloat16(read_batch=eos_never_trained),
        may_fail=("30",),
    ),
    Mutant(
        "bfloat16_never_clips",
        "Ignores max_grad_norm in bfloat16 alone.",
        ("40",),
        in_bfloat16(clip=never_clip),
    ),
    Mutant(
        "bfloat16_decay_ignored",
        "Ignores weight decay in bfloat16 alone.",
        ("40",),
        in_bfloat16(update=no_decay),
    ),
    Mutant(
        "bfloat16_without_bias_correction",
        "AdamW without bias correction in bfloat16 alone.",
        ("40",),
        in_bfloat16(update=no_bias_correction),
    ),
    Mutant(
        "bfloat16_betas_and_epsilon_ignored",
        "Uses AdamW's usual betas and epsilon in bfloat16 alone.",
        ("40",),
        in_bfloat16(update=default_betas),
        may_fail=("20", "31"),
    ),
    Mutant(
        "bfloat16_moments",
        "Keeps the moments in bfloat16 when it computes in bfloat16.",
        ("40", "50"),
        in_bfloat16(update=bfloat16_moments),
        may_fail=("20", "31"),
    ),
    Mutant(
        "bfloat16_mean_of_means",
        "Averages the micro-batches' means in bfloat16 alone.",
        ("41",),
        in_bfloat16(window_gradient=mean_of_means),
        may_fail=("31", "40"),
    ),
    Mutant(
        "bfloat16_sum_of_micro_batches",
        "Adds the gradients of micro-batches up in bfloat16 when it computes in bfloat16.",
        ("41",),
        in_bfloat16(window_gradient=summed_in_bfloat16),
    ),
    Mutant(
        "bfloat16_dropout_not_rescaled",
        "Keeps inputs without the factor 1 / (1 - p) in bfloat16 alone.",
        ("43",),
        in_bfloat16(masks=unscaled_masks),
        may_fail=("31",),
    ),
)
