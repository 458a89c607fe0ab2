"""Which format, rank, rate and batch for a model, its data and a memory: rules with their sources, and arithmetic.

Nothing is measured and nothing guessed: what fits is the estimate's peak with its margin, the rest is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from qlora_hal.errors import figures
from qlora_hal.memory.fitting import ACCUMULATION, BATCH, LENGTH, RECOMPUTE, Remedy
from qlora_hal.memory.placement import NONE

QLORA = "Dettmers et al. 2023, QLoRA (arXiv 2305.14314)"
REGRET = "Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora)"
CAPACITY = "Allen-Zhu and Li 2024, Physics of Language Models 3.3 (arXiv 2404.05405)"
ARITHMETIC = "arithmetic over the model's headers, as qlora-hal estimate does it"

SEQUENCES_PER_STEP = 16
"""QLoRA's batch for 7B and 13B, and for its Guanaco models of every size (its table 9)."""
ROOMY = 4
"""Sequences of a micro-batch that have to fit beside a base that is not quantized, or it is stored in 4 bits."""
RANKS = (16, 32, 64, 128, 256)
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0
LARGE_PARAMETERS = 20_000_000_000
"""Between QLoRA's 13B, trained at 2e-4, and its 33B, at 1e-4."""
SLOWER = 1.005
"""A price above it is told."""
SHORTEST, STEP = 128, 128
"""Row lengths that are advised: multiples of STEP, which kernels like, from SHORTEST."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What the rows are: how many, their trained tokens in one epoch, and lengths in tokens."""

    rows: int
    trained_tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class Situation:
    """What is advised on. `stored` is the weight format of a quantized checkpoint, or empty. `peak` is the estimate in
    bytes, with its margin, for settings by dotted path; `least_costly` what makes these fit, in the order that `auto`
    and `estimate` have; `adapter_parameters` are trainable weights by rank. `positions` is how long rows may be,
    `given_length` what the user wants them to be; devices can share the base where it `spreads`."""

    backend: str
    memory_bytes: int
    parameters: int
    stored: str
    rows: RowFacts | None
    positions: int | None
    peak: Callable[[Mapping[str, object]], int]
    least_costly: Callable[[Mapping[str, object]], Remedy]
    adapter_parameters: Callable[[int], int]
    given_length: int | None = None
    spreads: bool = True


@dataclass(frozen=True, slots=True)
class Advice:
    """One line of advice: settings to make, why, and where the rule is from."""

    subject: str
    choice: str
    why: str
    source: str
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """All advice, the settings together, and their peak in bytes."""

    advice: tuple[Advice, ...]
    peak: int
    fits: bool

    @property
    def settings(self) -> dict[str, object]:
        return {path: value for line in self.advice for path, value in line.settings.items()}


def advise(situation: Situation) -> Plan:
    """Advice on one run, in the order in which it is decided: rows, adapter, then what of the base fits beside them."""
    chosen = [*_about_rows(situation), *_about_the_adapter(situation)]
    settings = {path: value for line in chosen for path, value in line.settings.items()}
    storage = _storage(situation, settings)
    settings |= storage.settings
    batch = _batch(situation, settings)
    settings |= batch.settings
    peak = situation.peak(settings)
    lines = (storage, *chosen, batch, _about_serving())
    return Plan(lines, peak, peak <= situation.memory_bytes)


def _about_rows(situation: Situation) -> Iterator[Advice]:
    rows, positions = situation.rows, situation.positions
    if (given := situation.given_length) is not None:
        longest = (
            f"the longest of {rows.rows} rows has {rows.longest} tokens"
            if rows
            else "without --data no row was counted"
        )
        yield Advice("length", f"rows up to {given} tokens", f"it is given; {longest}", ARITHMETIC, {LENGTH: given})
        return
    if rows is None:
        return
    length = max(SHORTEST, -(-rows.longest // STEP) * STEP)
    length = min(length, positions) if positions else length
    why = f"the longest of {rows.rows} rows has {rows.longest} tokens"
    if positions and rows.longest > positions:
        why += f", and the model has positions up to {positions}: longer rows are cut"
    yield Advice("length", f"rows up to {length} tokens", why, ARITHMETIC, {LENGTH: length})


def _about_the_adapter(situation: Situation) -> Iterator[Advice]:
    yield _rank(situation)
    yield Advice(
        "modules",
        "adapters on all linear layers",
        "attention alone stays behind, also at a higher rank; on all layers LoRA reaches full tuning",
        f"{QLORA}, section 4; {REGRET}",
        {"lora.target_modules": "all-linear"},
    )
    yield Advice(
        "alpha",
        "alpha 32",
        "with the product scaled by alpha / r the best rate hardly depends on the rank",
        REGRET,
        {"lora.alpha": 32},
    )
    rate = 1e-4 if situation.parameters > LARGE_PARAMETERS else 2e-4
    size = figures.count(situation.parameters)
    yield Advice(
        "rate",
        f"learning rate {figures.rate(rate)}",
        f"2e-4 up to 13B and 1e-4 from 33B; this model has {size}. It is about ten times a rate of full tuning; try "
        "half and double",
        f"{QLORA}, table 9; {REGRET}",
        {"training.learning_rate": rate},
    )


def _rank(situation: Situation) -> Advice:
    if situation.rows is None:
        why = "without --data the size of the task is not known; small sets need no more"
        return Advice("rank", f"rank {RANKS[0]}", why, REGRET, {"lora.r": RANKS[0]})
    needed = situation.rows.trained_tokens * BITS_PER_TOKEN / BITS_PER_PARAMETER
    rank = next((rank for rank in RANKS if situation.adapter_parameters(rank) >= needed), RANKS[-1])
    held = situation.adapter_parameters(rank)
    why = (
        f"{figures.count(situation.rows.trained_tokens)} trained tokens of about a bit each, 2 bits to a weight: "
        f"{figures.count(needed)} weights are enough, and rank {rank} has {figures.count(held)}"
    )
    if held < needed:
        why += "; that is less than the rows hold, so full tuning may learn more of them"
    return Advice("rank", f"rank {rank}", why, f"{REGRET}; {CAPACITY}", {"lora.r": rank})


def _storage(situation: Situation, settings: Mapping[str, object]) -> Advice:
    memory = figures.size(situation.memory_bytes)
    if situation.stored:
        why = "the checkpoint is quantized already and is used unchanged"
        return Advice("format", situation.stored, why, ARITHMETIC)
    with_room = {"quantization.weight_format": "none", "training.per_device_train_batch_size": ROOMY}
    peak = situation.peak({**settings, **with_room})
    if peak <= situation.memory_bytes:
        return Advice(
            "format",
            "LoRA: the base is not quantized (none)",
            f"with micro-batches of {ROOMY} it needs up to {figures.size(peak)} of {memory}; no weight is rounded, and "
            "none is decoded in a step",
            ARITHMETIC,
            {"quantization.weight_format": "none"},
        )
    return Advice(
        "format",
        "QLoRA: the base in 4 bits (4bit)",
        f"not quantized it would need up to {figures.size(peak)} of {memory} with micro-batches of {ROOMY}; tuned in "
        "NF4 models reached what they reach in 16 bits",
        f"{ARITHMETIC}; {QLORA}, section 4",
        {"quantization.weight_format": "4bit"},
    )


def _batch(situation: Situation, settings: Mapping[str, object]) -> Advice:
    """The least costly of what fits: micro-batches of a step, recomputation, what waits on the host, moments."""
    whole: dict[str, object] = {BATCH: SEQUENCES_PER_STEP, ACCUMULATION: 1, RECOMPUTE: NONE}
    found = situation.least_costly({**settings, **whole})
    made = {**whole, **{path: value for path, value in found.settings.items() if path != LENGTH}}
    others = [step.words for step in found.steps if not {BATCH, LENGTH} & step.settings.keys()]
    if RECOMPUTE not in found.settings:
        others.insert(0, "activations kept")
    choice = f"{made[BATCH]} x {made[ACCUMULATION]} sequences, {', '.join(others)}"
    if not found.fits or LENGTH in found.settings:
        return Advice("batch", choice, _why_it_is_not_enough(situation, {**settings, **made}, found), ARITHMETIC, made)
    slower = f", at {1 / found.time:.2f} of the tokens/s" if found.time > SLOWER else ""
    on_host = f"; {found.needs.on_host}" if found.needs.on_host else ""
    given_up = "".join(f"; gives up: {one}" for one in found.gives_up)
    why = (
        f"the least costly that fits{slower}{on_host}{given_up}; {SEQUENCES_PER_STEP} sequences a step; larger batches "
        "cost LoRA more than full tuning"
    )
    return Advice("batch", choice, why, f"{ARITHMETIC}; {QLORA}, table 9; {REGRET}", made)


def _why_it_is_not_enough(situation: Situation, settings: Mapping[str, object], least: Remedy) -> str:
    short = situation.peak(settings) - situation.memory_bytes
    rows = f"rows of up to {least.settings[LENGTH]} tokens fit (data.max_seq_length), or take"
    why = f"even so it is {figures.size(short)} too much: {rows if least.fits else 'take'} a smaller model"
    if situation.spreads:
        why += ", or spread the base over several devices (--devices N --parallel.mode shard)"
    return why


def _about_serving() -> Advice:
    return Advice(
        "serving",
        "to serve one model fast: qlora-hal merge RUN OUT",
        "an adapter adds two products to each layer; merged, there are none. Keep it apart to serve many on one base",
        "Hu et al. 2021, LoRA (arXiv 2106.09685), section 4",
    )
