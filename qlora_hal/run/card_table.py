"""A model on every known card: full tuning, LoRA, and QLoRA in 8 and 4 bits, and what makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import MemoryEstimate
from qlora_hal.errors import QloraHalError
from qlora_hal.memory.fitting import BASE_OFFLOAD, RECOMPUTE, TOKENS, Remedy, Step, Verdict, remedy, verdict
from qlora_hal.memory.gpus import KNOWN_GPUS, KnownGpu
from qlora_hal.memory.placement import EMBEDDINGS, HEAD, LAYERS, OFFLOAD

if TYPE_CHECKING:
    from qlora_hal.run.planned_memory import PlannedModel

FULL, LORA, EIGHT_BIT, FOUR_BIT = "full", "LoRA", "8-bit", "4-bit"
LEVELS: Mapping[str, str] = {LORA: "none", EIGHT_BIT: "8bit", FOUR_BIT: "4bit"}
FULL_BYTES = {"weights": 2, "gradients": 2, "adapter": 4, "optimizer": 8}
"""Of each parameter in full tuning with mixed precision (Micikevicius et al. 2018): weights and gradients in 16 bits, a
master copy and two moments in float32. Not what is trained here: it stands beside for comparison."""


@dataclass(frozen=True, slots=True)
class CardRow:
    """One card. `verdicts` are by method; `advice` makes the last method of them fit, where it does not."""

    card: KnownGpu
    backend: str
    compute_dtype: str
    peaks: Mapping[str, MemoryEstimate]
    verdicts: Mapping[str, Verdict]
    advice: Remedy | None

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.card.name,
            "memory_bytes": self.card.memory_bytes,
            "devices": self.card.devices,
            "source": self.card.source,
            "backend": self.backend,
            "compute_dtype": self.compute_dtype,
            "methods": {
                name: {"total": self.peaks[name].total, "high": self.peaks[name].high, "class": found.value}
                for name, found in self.verdicts.items()
            },
            "advice": None
            if self.advice is None
            else {"settings": self.advice.settings, "high": self.advice.high, "fits": self.advice.fits},
        }


def card_rows(planned: PlannedModel, cards: Sequence[KnownGpu] = KNOWN_GPUS) -> tuple[CardRow, ...]:
    """Each card that a backend runs on which can store this model. A checkpoint that is quantized already has its own
    format alone."""

    @cache
    def on_device(vendor: str, dtype: str, name: str) -> tuple[PlannedModel, Mapping[str, MemoryEstimate]] | None:
        alike = (card for card in cards if (card.vendor, card.compute_dtype) == (vendor, dtype))
        card = next(card for card in alike if name in ("", card.name))
        try:
            there = planned.on(card)
            return there, peaks_of(there)
        except QloraHalError:  # no backend for the card stores this model
            return None

    def of_each(card: KnownGpu) -> str:
        return card.name if planned.is_left_to_the_card else ""

    rows = []
    for card in cards:
        if (found := on_device(card.vendor, card.compute_dtype, of_each(card))) is not None:
            there, peaks = found
            rows.append(_row(card, there, peaks))
    return tuple(rows)


def peaks_of(planned: PlannedModel) -> dict[str, MemoryEstimate]:
    """The peak of each method on one device."""
    stored = planned.facts.prequantized
    if stored is not None:
        return {stored.weight_format: planned.estimate()}
    peaks = {name: planned.estimate(_settings_of(level)) for name, level in LEVELS.items()}
    return {FULL: full_tuning(peaks[LORA], planned.facts.parameter_count), **peaks}


def full_tuning(lora: MemoryEstimate, parameters: int) -> MemoryEstimate:
    """The same activations with every weight trained."""
    return replace(lora, **{part: count * parameters for part, count in FULL_BYTES.items()})


def others_of(planned: PlannedModel) -> tuple[Step, ...]:
    """What else takes less memory, where the backend has it and the settings have it not yet."""
    config, steps = planned.config, list[Step]()
    features = planned.spec.capabilities.features
    if Feature.RECOMPUTATION_CHOICE in features:
        steps.append(Step("their inputs on the host", {RECOMPUTE: OFFLOAD}))
    four_bit = planned.spec.capabilities.levels.get("4bit")
    if planned.facts.prequantized is None and four_bit and planned.quantization.weight_format != four_bit:
        steps.append(Step("the base in 4 bits", _settings_of("4bit")))
    if config.training.optim == "adamw" and Feature.ADAMW_8BIT in features:
        steps.append(Step("moments in 8 bits", {"training.optim": "adamw_8bit"}))
    if Feature.BASE_OFFLOAD in features and not config.training.base_offload:
        parts = (EMBEDDINGS, HEAD) if planned.layers_stay else (EMBEDDINGS, LAYERS, HEAD)
        steps.append(Step(f"{' and '.join(parts)} on the host", {BASE_OFFLOAD: parts}))
    return tuple(steps)


def remedy_of(planned: PlannedModel, memory_bytes: int) -> Remedy:
    """What makes the run fit into so much memory of one device."""
    training, peak = planned.config.training, remembered(planned)
    accumulation = training.gradient_accumulation_steps if training.global_batch_size is None else None
    batch, length = planned.config.full_batch_rows, planned.config.data.max_seq_length
    of_rows = (lambda rows: {TOKENS: rows * length}) if training.tokens_per_batch is not None else None
    return remedy(
        peak, memory_bytes, batch, accumulation, length, others_of(planned), of_rows, training.global_batch_size
    )


def remembered(planned: PlannedModel) -> Callable[[Mapping[str, object]], MemoryEstimate]:
    """Its estimate with some settings otherwise, each computed once."""
    known: dict[tuple[tuple[str, object], ...], MemoryEstimate] = {}

    def peak(changes: Mapping[str, object]) -> MemoryEstimate:
        key = tuple(sorted(changes.items()))
        if key not in known:
            known[key] = planned.estimate(changes)
        return known[key]

    return peak


def _row(card: KnownGpu, there: PlannedModel, peaks: Mapping[str, MemoryEstimate]) -> CardRow:
    verdicts = {name: verdict(peak.total, peak.high, card.memory_bytes) for name, peak in peaks.items()}
    last = list(peaks)[-1]
    advice = None
    if verdicts[last] is not Verdict.FITS:
        least = there.with_settings(_settings_of("4bit")) if last == FOUR_BIT else there
        advice = remedy_of(least, card.memory_bytes)
    return CardRow(card, there.spec.name, there.compute_dtype, peaks, verdicts, advice)


def _settings_of(level: str) -> dict[str, object]:
    """A level, with nothing asked of block sizes and scales that only another one has."""
    return {
        "quantization.weight_format": level,
        "quantization.block_size": None,
        "quantization.double_quant": None,
    }
