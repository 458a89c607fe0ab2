"""What fits into a memory: classes, the largest batch and row, and the settings that make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from qlora_hal.memory.placement import FULL, NONE

if TYPE_CHECKING:
    from qlora_hal.contract.values import MemoryEstimate

Peak = Callable[[Mapping[str, object]], "MemoryEstimate"]
"""The estimate with some settings, by dotted path, otherwise."""

BATCH, ACCUMULATION = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
RECOMPUTE, LENGTH = "training.recompute", "data.max_seq_length"
BASE_OFFLOAD, TOKENS = "training.base_offload", "training.tokens_per_batch"
LENGTH_STEP = 128
"""Rows are planned in multiples of it, which kernels like."""
LONGEST, LARGEST_BATCH = 2**20, 1024
"""Where a model names no positions, and where a batch is large enough for any step."""


class Verdict(StrEnum):
    """`fits` with the margin of the arithmetic; `tight` only without it."""

    FITS = "fits"
    TIGHT = "tight"
    TOO_SMALL = "too small"


def verdict(total: int, high: int, memory_bytes: int) -> Verdict:
    """Which class a peak of `total`, or up to `high`, is in."""
    if high <= memory_bytes:
        return Verdict.FITS
    return Verdict.TIGHT if total <= memory_bytes else Verdict.TOO_SMALL


@dataclass(frozen=True, slots=True)
class Fit:
    """A batch that fits: `rows` x `length` tokens with activations kept or recomputed, and its peak with the margin."""

    rows: int
    length: int
    recomputed: bool
    high: int

    @property
    def settings(self) -> dict[str, object]:
        return {BATCH: self.rows, LENGTH: self.length, RECOMPUTE: _recompute(self.recomputed)}


def largest_fits(peak: Peak, memory_bytes: int, length: int, positions: int | None) -> tuple[Fit, ...]:
    """The largest batch of rows of `length`, and the longest single row up to `positions`, with activations kept and
    then recomputed; what does not fit is left out."""
    found = []
    longest = min(positions or LONGEST, LONGEST)
    for recomputed in (False, True):

        def high(rows: int, tokens: int, recomputed: bool = recomputed) -> int:
            return peak({BATCH: rows, LENGTH: tokens, RECOMPUTE: _recompute(recomputed)}).high

        rows = _largest(lambda rows: high(rows, length) <= memory_bytes, LARGEST_BATCH)
        if rows:
            found.append(Fit(rows, length, recomputed, high(rows, length)))
        steps = _largest(lambda steps: high(1, steps * LENGTH_STEP) <= memory_bytes, longest // LENGTH_STEP)
        if steps * LENGTH_STEP > length:
            found.append(Fit(1, steps * LENGTH_STEP, recomputed, high(1, steps * LENGTH_STEP)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that takes less memory: `words` as they stand in a list, and the settings."""

    words: str
    settings: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Remedy:
    """What makes a run fit, the cheapest first, together; `fits` False where it is the least that settings can do."""

    steps: tuple[Step, ...]
    high: int
    fits: bool

    @property
    def settings(self) -> dict[str, object]:
        return {path: value for step in self.steps for path, value in step.settings.items()}

    @property
    def words(self) -> str:
        return ", ".join(step.words for step in self.steps)


def flag(path: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, tuple):
        value = ",".join(value)
    return f"--{path} {value}"


def remedy(
    peak: Peak,
    memory_bytes: int,
    batch: int,
    accumulation: int | None,
    length: int,
    others: Sequence[Step],
    of_rows: Callable[[int], Mapping[str, object]] | None = None,
    rows_of_step: int | None = None,
) -> Remedy:
    """Smaller micro-batches with as many rows to a step; then activations recomputed; then `others`; then shorter rows.
    In the order of their price in time and quality (docs/choose_settings.md). `accumulation` None: the settings say how
    many rows a step has, whatever the micro-batch. `of_rows` are the settings that cut micro-batches without changing
    the rows of a step, where there are such. `rows_of_step` is a number that micro-batches have to divide."""
    taken: list[Step] = []

    def settings() -> dict[str, object]:
        return {path: value for step in taken for path, value in step.settings.items()}

    if (found := peak({}).high) <= memory_bytes:
        return Remedy((), found, fits=True)
    if accumulation is not None and of_rows is None:
        rows_of_step = batch * accumulation  # that number of rows, and not the next larger one
    for rows in _halves(batch):
        if rows_of_step is not None and rows_of_step % rows:
            continue
        words = f"micro-batches of {rows} row{'s' if rows > 1 else ''}"
        of_step = {} if accumulation is None else {ACCUMULATION: batch * accumulation // rows}
        taken = [Step(words, of_rows(rows) if of_rows else {BATCH: rows, **of_step})]
        if (found := peak(settings()).high) <= memory_bytes:
            return Remedy(tuple(taken), found, fits=True)
    for step in (Step("activations recomputed", {RECOMPUTE: FULL}), *others):
        taken = [*taken, step]
        if (found := peak(settings()).high) <= memory_bytes:
            return Remedy(tuple(taken), found, fits=True)
    most = (length - 1) // LENGTH_STEP
    fixed = settings()
    steps = _largest(lambda steps: peak({**fixed, LENGTH: steps * LENGTH_STEP}).high <= memory_bytes, most)
    shorter = max(steps, 1) * LENGTH_STEP
    if shorter < length:
        taken = [*taken, Step(f"rows of up to {shorter} tokens", {LENGTH: shorter})]
    found = peak(settings()).high
    return Remedy(tuple(taken), found, found <= memory_bytes)


def _recompute(layers: bool) -> str:
    return FULL if layers else NONE


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        batch = (batch + 1) // 2
        yield batch


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where each smaller one fits, too; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
