"""What one run computes, as the suite judges it: format, dtype, packing, dropout, recomputation, adapter, optimizer.

A part of the suite that is run for a combination opens every trainer as that run would, and takes the cases whose needs
are the run's. `sections_for_a_run` judges all of it together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Feature, WeightFormat
from qlora_hal_oracle.families import MODEL_TYPES

if TYPE_CHECKING:
    from qlora_hal_conformance.subject import Need

AUTO = "auto"
JUDGED_FAMILIES = frozenset(MODEL_TYPES.values())
"""The families of which models are drawn here, by `model_type`."""

MOST_ROWS, MOST_MICRO_BATCHES, MOST_TOKENS, LARGEST_RANK = 3, 3, 640, 256
"""A run may have more of each; what is judged stays within two minutes."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One run's choices, resolved; only `dtype` may still be `auto`, which the device answers.

    `stored_dtype` is that of the checkpoint's plain weights, `target_kinds` are last names of modules (`q_proj`), and
    `row_length` is the longest row in tokens.
    """

    weight_format: str
    dtype: str = AUTO
    family: str = "llama"
    block_size: int | None = None
    double_quant: bool = False
    prequantized: bool = False
    stored_dtype: str = "float32"
    gradient_checkpointing: bool = False
    packing: bool = False
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 16.0
    use_rslora: bool = False
    target_kinds: tuple[str, ...] = ()
    optimizer: str = "adamw"
    batch_size: int = 4
    accumulation: int = 1
    row_length: int = 1024
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    fp8_products: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored_as(self) -> WeightFormat:
        return WeightFormat(self.weight_format)

    @property
    def has_exact_moments(self) -> bool:
        """Whether the optimizer keeps its moments in float32."""
        return not self.optimizer.endswith("8bit")

    @property
    def judged_rank(self) -> int:
        return min(self.rank, LARGEST_RANK)

    @property
    def judged_alpha(self) -> float:
        """The alpha that keeps the run's scale at the rank that is judged."""
        share = self.judged_rank / self.rank
        return self.alpha * (share**0.5 if self.use_rslora else share)

    @property
    def features(self) -> frozenset[Feature]:
        """What the run asks of a backend beyond the minimum contract."""
        quantizes = self.stored_as is not WeightFormat.NONE
        asked = {
            Feature.QUANTIZE_ON_LOAD: quantizes and not self.prequantized,
            Feature.LOAD_PREQUANTIZED: self.prequantized,
            Feature.DOUBLE_QUANT: self.double_quant,
            Feature.GRADIENT_CHECKPOINTING: self.gradient_checkpointing,
            Feature.LORA_DROPOUT: self.dropout > 0.0,
            Feature.PACKING: self.packing,
            Feature.FP8_PRODUCTS: self.fp8_products,
        }
        optimizer = OPTIMIZER_FEATURE[self.optimizer]
        wanted = {feature for feature, is_asked in asked.items() if is_asked}
        return frozenset(wanted if optimizer is None else wanted | {optimizer})

    def covers(self, needs: Iterable[Need], dtype: str) -> bool:
        """Whether a case that needs this is about the run, which computes in `dtype`."""
        return all(self._covers(need, dtype) for need in needs)

    def _covers(self, need: Need, dtype: str) -> bool:
        match need:
            case Feature():
                return need in self.features
            case WeightFormat():
                return need is self.stored_as
            case (weight_format, block_size):
                return weight_format is self.stored_as and block_size == self.block_size
            case _:
                return need == dtype

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "target_kinds": list(self.target_kinds)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Combination:
        return cls(**{**record, "target_kinds": tuple(record["target_kinds"])})


def judged_in_words(combination: Combination, dtype: str) -> list[str]:
    """What a run of the cases is about, a line for each choice."""
    c = combination
    blocks = f" in blocks of {c.block_size}" if c.block_size else ""
    doubled = ", its scales quantized too" if c.double_quant else ""
    came = "read from a checkpoint that holds it" if c.prequantized else f"made of {c.stored_dtype} weights"
    chosen = " (what auto takes here)" if c.dtype == AUTO else ""
    targets = ", ".join(c.target_kinds) or "every linear layer"
    scale = "alpha / sqrt(r)" if c.use_rslora else "alpha / r"
    lines = [
        f"a drawn model of {c.family}" if c.family in JUDGED_FAMILIES else "a drawn Llama",
        f"base weights: {c.weight_format}{blocks}{doubled}, {came}",
        f"computing in {dtype or 'a dtype that was not found out'}{chosen}"
        + (", products with the base in 8-bit floats" if c.fp8_products else ""),
        f"adapter: rank {c.judged_rank}, {scale} = {_scale(c):g}, on {targets}",
        f"dropout: {c.dropout:g}" if c.dropout else "no dropout",
        "several samples packed into a row" if c.packing else "one sample in each row",
        "activations computed anew in the backward pass" if c.gradient_checkpointing else "activations kept",
        f"{min(c.accumulation, MOST_MICRO_BATCHES)} micro-batches of {min(c.batch_size, MOST_ROWS)} rows in a step, "
        f"rows of up to {min(c.row_length, MOST_TOKENS)} tokens",
        f"optimizer: {c.optimizer}, rate {c.learning_rate:g}, decay {c.weight_decay:g}, "
        + ("no clipping" if c.max_grad_norm is None else f"clipped at {c.max_grad_norm:g}"),
    ]
    if c.options:
        lines.append("options: " + ", ".join(f"{name} = {value}" for name, value in c.options.items()))
    return lines


def not_judged_in_words(combination: Combination) -> list[str]:
    """What of the run nobody looked at: every line is something that may still be wrong."""
    c = combination
    lines = ["the model's own weights and size: small drawn models stand for it"]
    if c.family not in JUDGED_FAMILIES:
        known = ", ".join(sorted(JUDGED_FAMILIES))
        lines.insert(0, f"the layers of {c.family or 'this family'}: the drawn models are of {known}")
    if c.rank > LARGEST_RANK:
        lines.append(f"rank {c.rank}: {LARGEST_RANK} was judged, with the same scale")
    if c.accumulation > MOST_MICRO_BATCHES or c.batch_size > MOST_ROWS:
        lines.append(f"windows of {c.accumulation} x {c.batch_size} rows: fewer were judged")
    if c.row_length > MOST_TOKENS:
        lines.append(f"rows of {MOST_TOKENS + 1} to {c.row_length} tokens")
    if c.fp8_products:
        lines.append("the run's own adapter and window: products in 8-bit floats are judged by section 34 alone")
    if not c.has_exact_moments:
        lines.append("every number of an 8-bit moment: whether it learns, and how far a resumed run drifts")
    return [*lines, "data, chat template and tokenizer", "memory, and how fast it is", "answers (generation)"]


def _scale(combination: Combination) -> float:
    rank = combination.rank
    return combination.alpha / (rank**0.5 if combination.use_rslora else rank)
