"""Wrong products in 8-bit floats: scales, roundings, and what the adapter reads and is added to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.values import Batch, LossSum
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, Fp8Products, OracleLlama
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.fp8 import LARGEST, RowScaled, row_scaled, row_scales, to_e4m3
from qlora_hal_oracle.lora import AdaptedLinear, EightBit, LinearTrace
from qlora_hal_oracle.shape import HEAD

from .registry import Mutant, with_rooms, with_trainer

NOT_A_NUMBER_BEYOND = 464.0
"""Where a conversion that does not saturate leaves E4M3."""


class ScalesOfTheNextRow(Fp8Products):
    def of_weight(self, module: str, weight: Float64) -> RowScaled:
        honest = row_scaled(weight)
        return replace(honest, scales=np.roll(honest.scales, 1, axis=0))


class InputScalesOfTheNextRow(Fp8Products):
    def of_input(self, x: Float64) -> Float64:
        honest = row_scaled(x)
        return honest.elements * np.roll(honest.scales, 1, axis=-2)


class OneScaleToAWeight(Fp8Products):
    def of_weight(self, module: str, weight: Float64) -> RowScaled:
        scales = np.full((len(weight), 1), float(np.max(row_scales(weight))))
        return RowScaled(to_e4m3(weight / scales), scales)


class OneScaleToABatch(Fp8Products):
    def of_input(self, x: Float64) -> Float64:
        scale = float(np.max(row_scales(x)))
        rounded: Float64 = to_e4m3(x / scale) * scale
        return rounded


class OneScaleToAGradient(Fp8Products):
    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        columns = grad * scales[:, 0]
        scale = max(float(np.max(np.abs(columns))) / LARGEST, float(np.finfo(np.float64).tiny))
        rounded: Float64 = to_e4m3(columns / scale) * scale
        return rounded


class GradientRoundedBeforeTheColumnScale(Fp8Products):
    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        return row_scaled(grad).values * scales[:, 0]


class GradientWithoutTheColumnScale(Fp8Products):
    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        return row_scaled(grad).values


def truncated(values: Float64) -> Float64:
    """Toward zero instead of to the nearest."""
    size = np.minimum(np.abs(values), LARGEST)
    step = np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 1, -6) - 3)
    cut: Float64 = np.copysign(np.floor(size / step) * step, values)
    return cut


class WeightTruncated(Fp8Products):
    def of_weight(self, module: str, weight: Float64) -> RowScaled:
        scales = row_scales(weight)
        return RowScaled(truncated(weight / scales), scales)


class InputTruncated(Fp8Products):
    def of_input(self, x: Float64) -> Float64:
        scales = row_scales(x)
        return truncated(x / scales) * scales


class GradientTruncated(Fp8Products):
    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        columns = grad * scales[:, 0]
        own = row_scales(columns)
        return truncated(columns / own) * own


class ScaledToTheWrongLargest(Fp8Products):
    """480 is what four exponent bits would reach if none of their codes were NaN."""

    largest = 480.0

    def of_input(self, x: Float64) -> Float64:
        scales = row_scales(x) * LARGEST / self.largest
        quotients = x / scales
        beyond = np.abs(quotients) >= NOT_A_NUMBER_BEYOND
        return np.where(beyond, np.nan, to_e4m3(quotients)) * scales


class CutOffAt448(ScaledToTheWrongLargest):
    """Scaled to twice the largest: what is beyond is cut off."""

    largest = 896.0

    def of_input(self, x: Float64) -> Float64:
        scales = row_scales(x) * LARGEST / self.largest
        return to_e4m3(x / scales) * scales


@dataclass(frozen=True, slots=True)
class ElementsOfAnotherLayer(Fp8Products):
    """A buffer for the decoded weight that is filled once for each kind of module."""

    held: dict[str, RowScaled] = field(default_factory=dict)

    def of_weight(self, module: str, weight: Float64) -> RowScaled:
        honest = row_scaled(weight)
        stale = self.held.setdefault(module.rpartition(".")[2], honest)
        return replace(honest, elements=stale.elements) if stale.elements.shape == honest.elements.shape else honest


class FiveExponentBits(Fp8Products):
    """E5M2, which many use for gradients, at E4M3's scale."""

    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        columns = grad * scales[:, 0]
        own = row_scales(columns)
        size = np.abs(columns / own)
        step = np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 1, -14) - 2)
        rounded: Float64 = np.copysign(np.rint(size / step) * step, columns) * own
        return rounded


class AddedAfterRounding(AdaptedLinear):
    def forward(self, x: Float64, arithmetic: Arithmetic, mask: Float64 | None = None) -> tuple[Float64, LinearTrace]:
        bare = AdaptedLinear(self.module, self.weight, self.bias, None, None, self.scale, self.eight_bit)
        base, _ = bare.forward(x, arithmetic)
        alone = AdaptedLinear(self.module, np.zeros_like(self.weight), None, self.lora_a, self.lora_b, self.scale)
        product, trace = alone.forward(x, arithmetic, mask)
        return arithmetic.store(base + product), trace


class AdapterReadsRounded(AdaptedLinear):
    def forward(self, x: Float64, arithmetic: Arithmetic, mask: Float64 | None = None) -> tuple[Float64, LinearTrace]:
        return super().forward(row_scaled(x).values, arithmetic, mask)


def _as(kind: type[AdaptedLinear], honest: AdaptedLinear) -> AdaptedLinear:
    if honest.eight_bit is None:
        return honest
    fields = (honest.module, honest.weight, honest.bias, honest.lora_a, honest.lora_b, honest.scale, honest.eight_bit)
    return kind(*fields)


class AdapterAddedAfterRounding(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        return _as(AddedAfterRounding, super().linear(module))


class AdapterInputRounded(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        return _as(AdapterReadsRounded, super().linear(module))


class HeadRoundedToo(OracleLlama):
    def use_fp8(self, products: Fp8Products) -> None:
        super().use_fp8(products)
        self._eight_bit[HEAD] = EightBit(products, products.of_weight(HEAD, super().linear(HEAD).weight))


class Ignored(ReferenceTrainer):
    """Takes the request and multiplies in bfloat16."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, replace(compute, fp8_products=False))


class EvaluatesInBfloat16(ReferenceTrainer):
    def evaluate(self, batches: list[Batch]) -> LossSum:  # type: ignore[override]
        model = self.attached.model
        kept, model._eight_bit = model._eight_bit, {}
        try:
            return super().evaluate(batches)
        finally:
            model._eight_bit = kept


class RecomputesInBfloat16(ReferenceTrainer):
    """With recomputation what training sees is in bfloat16."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        fp8 = compute.fp8_products and not compute.gradient_checkpointing
        super().load(source, quantization, replace(compute, fp8_products=fp8))


MUTANTS = (
    Mutant(
        "fp8_ignored",
        "Takes `fp8_products` and multiplies in bfloat16.",
        ("34",),
        with_trainer(Ignored),
    ),
    Mutant(
        "fp8_weight_scale_of_the_next_row",
        "Multiplies each output by the weight scale of the row before.",
        ("34",),
        with_rooms(fp8=ScalesOfTheNextRow()),
    ),
    Mutant(
        "fp8_input_scale_of_the_next_row",
        "Multiplies each token's products by the input scale of the token before.",
        ("34",),
        with_rooms(fp8=InputScalesOfTheNextRow()),
    ),
    Mutant(
        "fp8_one_scale_to_a_weight",
        "Rounds a weight with one scale for the whole tensor.",
        ("34",),
        with_rooms(fp8=OneScaleToAWeight()),
    ),
    Mutant(
        "fp8_one_scale_to_a_batch",
        "Rounds the inputs with one scale for all tokens.",
        ("34",),
        with_rooms(fp8=OneScaleToABatch()),
    ),
    Mutant(
        "fp8_one_scale_to_a_gradient",
        "Rounds the gradient of an output with one scale for all tokens.",
        ("34",),
        with_rooms(fp8=OneScaleToAGradient()),
    ),
    Mutant(
        "fp8_gradient_not_rounded",
        "Goes back through the 8-bit weight with a gradient that is not rounded.",
        ("34",),
        with_rooms(fp8=Fp8Products(gradients=False)),
    ),
    Mutant(
        "fp8_input_not_rounded",
        "Multiplies the 8-bit weight with inputs that are not rounded.",
        ("34",),
        with_rooms(fp8=Fp8Products(inputs=False)),
    ),
    Mutant(
        "fp8_weight_not_rounded",
        "Rounds inputs and gradients, and multiplies with the weight itself.",
        ("34",),
        with_rooms(fp8=Fp8Products(weights=False)),
    ),
    Mutant(
        "fp8_gradient_rounded_before_the_column_scale",
        "Rounds the gradient first, and multiplies its columns by the weight's scales afterwards.",
        ("34",),
        with_rooms(fp8=GradientRoundedBeforeTheColumnScale()),
    ),
    Mutant(
        "fp8_gradient_without_the_column_scale",
        "Leaves the weight's scales out on the way back.",
        ("34",),
        with_rooms(fp8=GradientWithoutTheColumnScale()),
    ),
    Mutant(
        "fp8_gradient_in_e5m2",
        "Rounds gradients to two mantissa bits.",
        ("34",),
        with_rooms(fp8=FiveExponentBits()),
    ),
    Mutant(
        "fp8_weight_truncated",
        "Cuts a weight's digits off where it should round to the nearest.",
        ("34",),
        with_rooms(fp8=WeightTruncated()),
    ),
    Mutant(
        "fp8_input_truncated",
        "Cuts an input's digits off where it should round to the nearest.",
        ("34",),
        with_rooms(fp8=InputTruncated()),
    ),
    Mutant(
        "fp8_gradient_truncated",
        "Cuts a gradient's digits off where it should round to the nearest.",
        ("34",),
        with_rooms(fp8=GradientTruncated()),
    ),
    Mutant(
        "fp8_nan_beyond_the_largest",
        "Scales to 480, and what lies beyond 448 becomes NaN.",
        ("34",),
        with_rooms(fp8=ScaledToTheWrongLargest()),
    ),
    Mutant(
        "fp8_cut_off_at_the_largest",
        "Scales to 896, and cuts the largest inputs off at 448.",
        ("34",),
        with_rooms(fp8=CutOffAt448()),
    ),
    Mutant(
        "fp8_elements_of_another_layer",
        "Multiplies with the 8-bit numbers of the first layer's module, and the scales of its own.",
        ("34",),
        lambda spec: with_rooms(fp8=ElementsOfAnotherLayer())(spec),
    ),
    Mutant(
        "fp8_adapter_added_after_rounding",
        "Adds the adapter's product onto an output that is already rounded.",
        ("34",),
        with_rooms(model=AdapterAddedAfterRounding),
    ),
    Mutant(
        "fp8_adapter_reads_the_rounded_input",
        "Gives the adapter the input that was rounded to 8 bits.",
        ("34",),
        with_rooms(model=AdapterInputRounded),
    ),
    Mutant(
        "fp8_of_the_head_too",
        "Multiplies with the head in 8-bit floats as well.",
        ("34",),
        with_rooms(model=HeadRoundedToo),
    ),
    Mutant(
        "fp8_evaluates_in_bfloat16",
        "Trains with 8-bit products and evaluates without.",
        ("34",),
        with_trainer(EvaluatesInBfloat16),
    ),
    Mutant(
        "fp8_recomputes_in_bfloat16",
        "With recomputation the products are in bfloat16.",
        ("34",),
        with_trainer(RecomputesInBfloat16),
    ),
)
