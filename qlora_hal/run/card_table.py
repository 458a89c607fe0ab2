"""A model on every known card: full tuning, LoRA, and QLoRA in 8 and 4 bits, and what makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE
from qlora_hal.contract.values import MemoryEstimate
from qlora_hal.detect.gpu_dtypes import lacking_dtype_of
from qlora_hal.errors import QloraHalError
from qlora_hal.memory.fitting import (
    AS_IT_IS,
    BASE_OFFLOAD,
    BATCH,
    LENGTH,
    LONGEST,
    RECOMPUTE,
    TOKENS,
    Asked,
    Choices,
    Fit,
    Needs,
    NeedsOf,
    PriceOf,
    Remedy,
    Room,
    Step,
    Verdict,
    largest_fits,
    remedy,
    smaller_batches,
    verdict,
)
from qlora_hal.memory.gpus import KNOWN_GPUS, KnownGpu
from qlora_hal.memory.placement import AUTO, OFFLOAD, SELECTIVE, asked_recompute, base_offloads, recomputations
from qlora_hal.memory.placement import FULL as WHOLE_LAYERS
from qlora_hal.memory.time_prices import PassChoice
from qlora_hal.model.expert_stacks import is_shared
from qlora_hal.ranks.planning import SHARD

if TYPE_CHECKING:
    from qlora_hal.run.planned_memory import PlannedModel

FULL, LORA, EIGHT_BIT, FOUR_BIT = "full", "LoRA", "8-bit", "4-bit"
LEVELS: Mapping[str, str] = {LORA: "none", EIGHT_BIT: "8bit", FOUR_BIT: "4bit"}
OPTIMIZER, EXPERTS, CHECKPOINTING = "training.optim", "lora.experts", "training.gradient_checkpointing"
DTYPE = "quantization.compute_dtype"
MODE = "parallel.mode"
RECOMPUTE_WORDS: Mapping[str, str] = {
    SELECTIVE: "the feed-forward recomputed",
    WHOLE_LAYERS: "activations recomputed",
    OFFLOAD: "activations recomputed with their inputs on the host",
}
FULL_BYTES = {"weights": 2, "gradients": 2, "adapter": 4, "optimizer": 8}
"""Of each parameter in full tuning with mixed precision (Micikevicius et al. 2018): weights and gradients in 16 bits, a
master copy and two moments in float32. Not what is trained here: it stands beside for comparison."""


Peaks = Mapping[str, MemoryEstimate]
"""By method."""
AdviceOf = Callable[[int], Remedy]
"""What makes a run fit into so many bytes of a device."""


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
            "architecture": self.card.architecture,
            "backend": self.backend,
            "compute_dtype": self.compute_dtype,
            "methods": {
                name: {"total": self.peaks[name].total, "high": self.peaks[name].high, "class": found.value}
                for name, found in self.verdicts.items()
            },
            "advice": None
            if self.advice is None
            else {
                "settings": self.advice.settings,
                "high": self.advice.high,
                "host_bytes": self.advice.needs.host,
                "disk_bytes": self.advice.needs.disk,
                "fits": self.advice.fits,
                "time": round(self.advice.time, 3),
                "gives_up": list(self.advice.gives_up),
            },
        }


def card_rows(planned: PlannedModel, cards: Sequence[KnownGpu] = KNOWN_GPUS) -> tuple[CardRow, ...]:
    """Each card that a backend runs on which can store this model. A checkpoint that is quantized already has its own
    format alone."""

    def kind_of(card: KnownGpu) -> tuple[str, str, bool]:
        lacks = bool(lacking_dtype_of(planned.config.quantization.compute_dtype, card))
        return card.vendor, card.compute_dtype, lacks

    @cache
    def on_device(kind: tuple[str, str, bool], name: str) -> tuple[PlannedModel, Peaks, AdviceOf] | None:
        card = next(card for card in cards if kind_of(card) == kind and name in ("", card.name))
        try:
            there = planned.on(card)
            peaks = peaks_of(there)
            least = there.with_settings(_settings_of("4bit")) if FOUR_BIT in peaks else there
            return there, peaks, partial(_remedy_on_a_card, least, remembered(least))
        except QloraHalError:  # no backend for the card stores this model
            return None

    def of_each(card: KnownGpu) -> str:
        return card.name if planned.is_left_to_the_card else ""

    rows = []
    for card in cards:
        if (found := on_device(kind_of(card), of_each(card))) is not None:
            rows.append(_row(card, *found))
    return tuple(rows)


def _remedy_on_a_card(planned: PlannedModel, needs: NeedsOf, memory_bytes: int) -> Remedy:
    return remedy_of(planned, Room(memory_bytes), needs)


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


def choices_of(planned: PlannedModel) -> Choices:
    """What takes less memory, where the backend has it and the settings have it not yet."""
    return (*_choices_of_the_step(planned), (AS_IT_IS, *_four_bits(planned)), (AS_IT_IS, *_fewer_experts(planned)))


def _choices_of_the_step(planned: PlannedModel) -> Choices:
    """What leaves the format of the base and the modules that are trained as they are."""
    training = planned.config.training
    accumulation = training.gradient_accumulation_steps if training.global_batch_size is None else None
    length = planned.config.data.max_seq_length
    of_rows = (lambda rows: {TOKENS: rows * length}) if training.tokens_per_batch is not None else None
    batches = smaller_batches(planned.config.full_batch_rows, accumulation, of_rows, planned.rows_of_step)
    return (
        _dtype_there(planned),
        _spread(planned),
        tuple(batches),
        (AS_IT_IS, *_more_recomputed(planned)),
        (AS_IT_IS, *_more_offloaded(planned)),
        (AS_IT_IS, *_smaller_moments(planned)),
    )


def _dtype_there(planned: PlannedModel) -> tuple[Step, ...]:
    """A dtype that the device does not compute in has to be another one, whatever fits."""
    if not planned.lacking_dtype:
        return (AS_IT_IS,)
    there = planned.with_settings({DTYPE: AUTO}).compute_dtype
    return (Step(f"{there} in place of {planned.config.quantization.compute_dtype}", {DTYPE: AUTO}),)


def _spread(planned: PlannedModel) -> tuple[Step, ...]:
    """What `auto` came to with the settings as they are has to be said with others: they could make it `data`."""
    if planned.share == 1 or planned.config.parallel.mode == SHARD:
        return (AS_IT_IS,)
    return (Step(f"the base spread over {planned.share} devices", {MODE: SHARD}),)


def _more_recomputed(planned: PlannedModel) -> Iterator[Step]:
    asked = asked_recompute(planned.config.training)
    if asked == AUTO:
        return
    choices = recomputations(planned.spec.capabilities.features, planned.moves)
    for choice in choices[choices.index(asked) + 1 :] if asked in choices else ():
        yield Step(RECOMPUTE_WORDS[choice], {RECOMPUTE: choice})


def _more_offloaded(planned: PlannedModel) -> Iterator[Step]:
    now = planned.config.training.base_offload
    if now == AUTO:
        return
    for parts in base_offloads(planned.spec.capabilities.features, planned.moves):
        if set(parts) > set(now):
            yield _offloaded(parts)


def _offloaded(parts: Sequence[str]) -> Step:
    return Step(f"{' and '.join(parts)} on the host", {BASE_OFFLOAD: tuple(parts)})


def _smaller_moments(planned: PlannedModel) -> Iterator[Step]:
    smaller = f"{planned.config.training.optim}_8bit"
    if (feature := OPTIMIZER_FEATURE.get(smaller)) is not None and feature in planned.spec.capabilities.features:
        yield Step("moments in 8 bits", {OPTIMIZER: smaller}, "the moments are rounded to 8 bits")


def _four_bits(planned: PlannedModel) -> Iterator[Step]:
    four_bit = planned.spec.capabilities.levels.get("4bit")
    if planned.facts.prequantized is None and four_bit and planned.quantization.weight_format != four_bit:
        yield Step("the base in 4 bits", _settings_of("4bit"), "the base's weights are rounded to 4 bits")


def _fewer_experts(planned: PlannedModel) -> Iterator[Step]:
    """Of a mixture the adapters of its experts are most of what is trained."""
    modules, asked = planned.facts.linear_modules, planned.config.lora.experts
    routed = sum(modules[path].experts > 1 for path in planned.targets_of(planned.facts))
    fewer = {"all": ("shared", "none") if any(map(is_shared, modules)) else ("none",), "shared": ("none",)}
    for choice in fewer.get(asked, ()):
        if choice == "shared" and not routed:
            continue
        try:
            trained = len(planned.with_settings({EXPERTS: choice}).targets_of(planned.facts))
        except QloraHalError:  # nothing else is a target
            continue
        left = len(planned.targets_of(planned.facts)) - trained
        if left:
            which = "routed experts" if choice == "shared" else "experts"
            words = f"no adapters on the {which}"
            yield Step(words, {EXPERTS: choice}, f"the {which} stay as they are: {trained} modules are trained")


def fits_of(
    planned: PlannedModel, room: Room, given: Collection[str] = (), needs: NeedsOf | None = None
) -> tuple[Fit, ...]:
    """What fits into so much memory of one device and of the host, by the arithmetic or by other `needs`; nothing where
    the device lacks the dtype. Settings that are `given`, by dotted path, stay as they are; of the others batch,
    length, what is recomputed, parts of the base on the host and the optimizer are looked for."""
    if planned.lacking_dtype:
        return ()
    training, length = planned.config.training, planned.config.data.max_seq_length
    features = planned.spec.capabilities.features
    again: list[Step] = [AS_IT_IS]
    if asked_recompute(training) != AUTO and not {RECOMPUTE, CHECKPOINTING} & set(given):
        again = [Step(f"recompute {one}", {RECOMPUTE: one}) for one in recomputations(features, planned.moves)]
    parts: list[Step] = [AS_IT_IS]
    if BASE_OFFLOAD not in given:
        parts += [_offloaded(one) for one in base_offloads(features, planned.moves) if one]
    moments = [AS_IT_IS, *(() if OPTIMIZER in given else _smaller_moments(planned))]
    longest = None if LENGTH in given else min(planned.facts.max_position_embeddings or LONGEST, LONGEST)
    if training.tokens_per_batch is not None:  # rows follow from the length, which is at most so many tokens
        longest = None if longest is None else min(longest, training.tokens_per_batch)
        full, alone = planned.config.full_batch_rows, training.tokens_per_batch // 2 + 1
        asked = Asked(length, full, longest, alone if full > 1 else 0, settings_of=lambda _, length: {LENGTH: length})
    else:
        rows = training.per_device_train_batch_size if BATCH in given else None
        asked = Asked(length, rows, longest, rows_of_step=planned.rows_of_step)
    choices = (_spread(planned), again, parts, moments)
    return largest_fits(needs or remembered(planned), price_of(planned), room, choices, asked)


def price_of(planned: PlannedModel) -> PriceOf:
    """What a pass takes with some settings otherwise."""

    def price(changes: Mapping[str, object]) -> PassChoice:
        return planned.with_settings(changes).price()

    return price


def remedy_of(planned: PlannedModel, room: Room, needs: NeedsOf | None = None) -> Remedy:
    """What makes the run fit into so much memory of one device and of the host, by the arithmetic or by other
    `needs`."""
    length = planned.config.data.max_seq_length
    return remedy(needs or remembered(planned), price_of(planned), room, choices_of(planned), length)


def least_costly_step(planned: PlannedModel, room: Room) -> Remedy:
    """The same where the format is settled."""
    length = planned.config.data.max_seq_length
    choices = (*_choices_of_the_step(planned), (AS_IT_IS, *_fewer_experts(planned)))
    return remedy(remembered(planned), price_of(planned), room, choices, length)


def remembered(planned: PlannedModel, high_of: Callable[[MemoryEstimate], int] = lambda memory: memory.high) -> NeedsOf:
    """What it takes, by the estimate with its margin, with some settings otherwise; each is computed once."""
    known: dict[tuple[tuple[str, object], ...], Needs] = {}

    def needs(changes: Mapping[str, object]) -> Needs:
        key = tuple(sorted(changes.items()))
        if key not in known:
            asked = planned.with_settings(changes)
            placement = asked.placement()
            waits = asked.host_bytes(placement)
            known[key] = Needs(high_of(asked.memory_with(placement)), waits.memory, waits.disk)
        return known[key]

    return needs


def _row(card: KnownGpu, there: PlannedModel, peaks: Peaks, advice_of: AdviceOf) -> CardRow:
    limit = there.config.training.memory_limit_bytes
    has = card.memory_bytes if limit is None else min(limit, card.memory_bytes)
    lacking = lacking_dtype_of(there.config.quantization.compute_dtype, card)
    verdicts = {name: verdict(peak.total, peak.high, has, lacking) for name, peak in peaks.items()}
    advice = None if verdicts[list(peaks)[-1]] is Verdict.FITS else advice_of(has)
    return CardRow(card, there.spec.name, there.compute_dtype, peaks, verdicts, advice)


def _settings_of(level: str) -> dict[str, object]:
    """A level, with nothing asked of block sizes and scales that only another one has."""
    return {
        "quantization.weight_format": level,
        "quantization.block_size": None,
        "quantization.double_quant": None,
    }
