"""What fits into a memory: classes, the largest batch and row, and the settings that make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from qlora_hal.memory.time_prices import PassChoice

Peak = Callable[[Mapping[str, object]], int]
"""Bytes at the peak, with its margin, with some settings, by dotted path, otherwise."""

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
class Step:
    """One thing that is done otherwise: `words` as they stand in a list, the settings, and, where another model comes
    out of training than without it, what that gives up. Without settings: nothing is done."""

    words: str
    settings: Mapping[str, object]
    gives_up: str = ""


AS_IT_IS = Step("", {})
Choices = Sequence[Sequence[Step]]
"""What may be done otherwise: of each subject one step, the first of them `AS_IT_IS` where it may be left alone."""
RELUCTANCE = 1.25
"""What changes the trained model is taken where anything else would take so much more time: a judgement."""


PriceOf = Callable[[Mapping[str, object]], PassChoice]
"""What a pass takes with some settings, by dotted path, otherwise."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Steps that are taken together."""

    steps: tuple[Step, ...] = ()

    @property
    def settings(self) -> dict[str, object]:
        return {path: value for step in self.steps for path, value in step.settings.items()}

    @property
    def words(self) -> str:
        return ", ".join(step.words for step in self.steps)

    @property
    def gives_up(self) -> tuple[str, ...]:
        return tuple(step.gives_up for step in self.steps if step.gives_up)


def all_of(choices: Choices) -> Iterator[Taken]:
    """Each combination."""
    for steps in product(*choices):
        yield Taken(tuple(step for step in steps if step.settings))


def cost(choice: PassChoice, taken: Taken) -> tuple[bool, float]:
    """To be compared: time, with `RELUCTANCE` for each step that changes the trained model. Parts of the base that
    cross whole come last, for the rate at which they do is the machine's."""
    return choice.crosses_whole, choice.time * RELUCTANCE ** len(taken.gives_up)


@dataclass(frozen=True, slots=True)
class Fit:
    """A batch that fits: `rows` x `length` tokens with what was chosen, its peak with the margin, and what a pass
    takes. `is_measured` where a probe trained with it."""

    rows: int
    length: int
    taken: Taken
    settings: Mapping[str, object]
    high: int
    choice: PassChoice
    is_measured: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Asked:
    """What is looked for: batches of rows of `length`, of `rows` where that is a number, and where the length is open
    rows up to `longest`. `settings_of` are those of a batch; micro-batches have to divide `rows_of_step`. Rows of the
    length `alone` and more are alone in their micro-batch where that is filled by tokens."""

    length: int
    rows: int | None = None
    longest: int | None = None
    alone: int = 0
    rows_of_step: int | None = None
    settings_of: Callable[[int, int], Mapping[str, object]] = lambda rows, length: {BATCH: rows, LENGTH: length}


def largest_fits(peak: Peak, price: PriceOf, memory_bytes: int, choices: Choices, asked: Asked) -> tuple[Fit, ...]:
    """The largest batches of rows of the length that is asked for, the fastest first and then those that hold more
    tokens and cost more time; then the longest rows alike. What does not fit is left out."""
    batches, long_rows = [], []
    for taken in all_of(choices):

        def fit(rows: int, length: int, taken: Taken = taken) -> Fit:
            settings = {**asked.settings_of(rows, length), **taken.settings}
            choice = price(settings)
            return Fit(choice.tokens // length, length, taken, settings, peak(settings), choice)

        def fits(rows: int, length: int, fit: Callable[[int, int], Fit] = fit) -> bool:
            return fit(rows, length).high <= memory_bytes

        if rows := _rows_that_fit(fits, asked):
            batches.append(fit(rows, asked.length))
        longest = _longest_that_fits(fits, asked)
        if longest > asked.length:
            long_rows.append(fit(asked.rows or 1, longest))
    return (*_worth_it(batches), *_worth_it(long_rows))


def _rows_that_fit(fits: Callable[[int, int], bool], asked: Asked) -> int:
    if asked.rows is not None:
        return asked.rows if fits(asked.rows, asked.length) else 0
    rows = _largest(lambda rows: fits(rows, asked.length), LARGEST_BATCH)
    return max((one for one in range(1, rows + 1) if (asked.rows_of_step or one) % one == 0), default=0)


def _longest_that_fits(fits: Callable[[int, int], bool], asked: Asked) -> int:
    alone = -(-asked.alone // LENGTH_STEP)
    most = (asked.longest or 0) // LENGTH_STEP
    found = _largest(lambda steps: fits(asked.rows or 1, max(steps, alone) * LENGTH_STEP), most)
    return LENGTH_STEP * max(found, alone) if found else 0


def _worth_it(found: Sequence[Fit]) -> Iterator[Fit]:
    """The one that costs least, and each that holds more tokens than all that cost less."""
    most = 0
    for one in sorted(found, key=lambda fit: (*cost(fit.choice, fit.taken), -fit.tokens)):
        if one.tokens > most:
            most = one.tokens
            yield one


@dataclass(frozen=True, slots=True)
class Remedy(Taken):
    """What makes a run fit; `fits` False where it is the least that settings can do. `time` of a token is in units of
    what it takes with nothing done."""

    high: int = 0
    fits: bool = True
    time: float = 1.0


def flag(path: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, tuple):
        value = ",".join(value)
    return f"--{path} {value}"


def remedy(peak: Peak, price: PriceOf, memory_bytes: int, choices: Choices, length: int) -> Remedy:
    """The combination of choices that fits and has the least `cost`; of equal ones the one that changes fewer settings.
    Shorter rows come last."""
    before = price({}).time

    def of(taken: Taken, high: int) -> Remedy:
        return Remedy(taken.steps, high, high <= memory_bytes, price(taken.settings).time / before)

    def rank(taken: Taken) -> tuple[bool, float, int]:
        return (*cost(price(taken.settings), taken), len(taken.settings))

    ranked, highs = sorted(all_of(choices), key=rank), []
    for taken in ranked:
        highs.append(peak(taken.settings))
        if highs[-1] <= memory_bytes:
            return of(taken, highs[-1])
    least = ranked[min(range(len(ranked)), key=highs.__getitem__)]
    most = (length - 1) // LENGTH_STEP
    steps = _largest(lambda steps: peak({**least.settings, LENGTH: steps * LENGTH_STEP}) <= memory_bytes, most)
    if (shorter := max(steps, 1) * LENGTH_STEP) < length:
        words = f"rows of up to {shorter} tokens"
        least = Taken((*least.steps, Step(words, {LENGTH: shorter}, "what of longer rows is beyond that is not seen")))
    return of(least, peak(least.settings))


def smaller_batches(
    batch: int,
    accumulation: int | None,
    of_rows: Callable[[int], Mapping[str, object]] | None = None,
    rows_of_step: int | None = None,
) -> Iterator[Step]:
    """Micro-batches cut in halves with as many rows to a step. `accumulation` None: the settings say how many rows a
    step has, whatever the micro-batch. `of_rows` are the settings that cut micro-batches without changing the rows of a
    step, where there are such. `rows_of_step` is a number that micro-batches have to divide."""
    yield AS_IT_IS
    if accumulation is not None and of_rows is None:
        rows_of_step = batch * accumulation  # that number of rows, and not the next larger one
    for rows in halves(batch):
        if rows_of_step is None or rows_of_step % rows == 0:
            of_step = {} if accumulation is None else {ACCUMULATION: batch * accumulation // rows}
            words = f"micro-batches of {rows} row{'s' if rows > 1 else ''}"
            yield Step(words, of_rows(rows) if of_rows else {BATCH: rows, **of_step})


def halves(batch: int) -> Iterator[int]:
    """The sizes of a micro-batch that is cut in halves again and again, down to 1."""
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
