"""What fits into a memory: classes, the largest batch and row, and the settings that make a run fit.

One order is behind all of it, `by_cost`: of what fits the least costly is taken, by `auto`, by `--fit` and by advice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import TYPE_CHECKING

from qlora_hal.errors.figures import size
from qlora_hal.memory.placement import (
    AUTO,
    Moves,
    Placement,
    asked_recompute,
    base_offloads,
    recomputations,
)
from qlora_hal.memory.time_prices import DISK_RATE, PassChoice

if TYPE_CHECKING:
    from collections.abc import Collection

    from qlora_hal.config.schema import TrainingConfig
    from qlora_hal.contract.capabilities import Feature


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a run takes of a device at its peak, with the margin, and of the host for what waits there, in its
    memory and on its disk."""

    device: int
    host: int = 0
    disk: int = 0

    @property
    def on_host(self) -> str:
        """What waits on the host, to stand behind another phrase; "" where nothing does."""
        whose = "its" if self.host else "the host's"
        disk = f"{size(self.disk)} of {whose} disk, priced at {size(DISK_RATE)}/s" if self.disk else ""
        memory = f"{size(self.host)} of the host's memory" if self.host else ""
        return " and ".join(filter(None, (memory, disk)))


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a run may take of a device, and of the host; None where that is not known."""

    device: int
    host: int | None = None

    def holds(self, needs: Needs) -> bool:
        return needs.device <= self.device and self.host_holds(needs)

    def host_holds(self, needs: Needs) -> bool:
        return self.host is None or needs.host <= self.host

    def least(self, needs: Sequence[Needs]) -> int:
        """Which of them takes the least of the device, of those that the host holds."""
        return min(range(len(needs)), key=lambda one: (not self.host_holds(needs[one]), needs[one].device))


NeedsOf = Callable[[Mapping[str, object]], Needs]
"""What a run takes with some settings, by dotted path, otherwise."""

BATCH, ACCUMULATION = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
RECOMPUTE, LENGTH = "training.recompute", "data.max_seq_length"
BASE_OFFLOAD, TOKENS = "training.base_offload", "training.tokens_per_batch"
LENGTH_STEP = 128
"""Rows are planned in multiples of it, which kernels like."""
LONGEST, LARGEST_BATCH = 2**20, 1024
"""Where a model names no positions, and where a batch is large enough for any step."""


class Verdict(StrEnum):
    """`fits` with the margin of the arithmetic; `tight` only without it; `no dtype` where the device, whatever its
    memory, does not compute in the dtype that is asked for."""

    FITS = "fits"
    TIGHT = "tight"
    TOO_SMALL = "too small"
    NO_DTYPE = "no dtype"


def verdict(total: int, high: int, memory_bytes: int, lacking: str = "") -> Verdict:
    """Which class a peak of `total`, or up to `high`, is in. `lacking` says why the device does not compute in the
    dtype, "" where it does."""
    if lacking:
        return Verdict.NO_DTYPE
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


def by_cost(choices: Choices, price: PriceOf) -> list[Taken]:
    """Each combination, the least costly first; of equal ones the one that changes fewer settings."""
    return sorted(all_of(choices), key=lambda taken: (*cost(price(taken.settings), taken), len(taken.settings)))


def chosen_placement(
    training: TrainingConfig,
    features: Collection[Feature],
    needs_of: Callable[[Placement], Needs],
    price_of: Callable[[Placement], PassChoice],
    room: Room | None,
    *,
    moves: Moves | None = None,
) -> Placement:
    """What was asked for, and where that is `auto` the least costly that the room holds. Where it holds none, the one
    with the lowest peak; where it is not known, the least costly of all."""
    recompute, parts = asked_recompute(training), training.base_offload
    moves = moves or Moves()
    again = recomputations(features, moves) if recompute == AUTO else [recompute]
    on_host = base_offloads(features, moves) if parts == "auto" else [parts]
    candidates = [Placement(kind, some) for kind in again for some in on_host]
    if AUTO not in (recompute, parts):
        return candidates[0]
    as_it_is = candidates[0]

    def order(one: Placement) -> tuple[bool, float, int]:
        changes = (one.recompute != as_it_is.recompute) + (one.base_offload != as_it_is.base_offload)
        return (*cost(price_of(one), Taken()), changes)

    candidates.sort(key=order)
    if room is None:
        return replace(candidates[0], why="the device does not tell how much memory it has")
    needs = [needs_of(candidate) for candidate in candidates]
    fitting = next((number for number, takes in enumerate(needs) if room.holds(takes)), None)
    number = room.least(needs) if fitting is None else fitting
    return replace(candidates[number], why=_why(needs[number], room))


def _why(needs: Needs, room: Room) -> str:
    relation = "within" if needs.device <= room.device else "the least there is, but above"
    peak = f"an estimated peak of {size(needs.device)}, {relation} {size(room.device)}"
    if not needs.on_host:
        return peak
    left = "" if room.host is None or room.host_holds(needs) else f", whose memory has {size(room.host)} left for it"
    return f"{peak}, beside {needs.on_host}{left}"


@dataclass(frozen=True, slots=True)
class Fit:
    """A batch that fits: `rows` x `length` tokens with what was chosen, its peak with the margin, what waits on the
    host and on its disk, and what a pass takes. `is_measured` where a probe trained with it."""

    rows: int
    length: int
    taken: Taken
    settings: Mapping[str, object]
    high: int
    choice: PassChoice
    host: int = 0
    disk: int = 0
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


def largest_fits(needs: NeedsOf, price: PriceOf, room: Room, choices: Choices, asked: Asked) -> tuple[Fit, ...]:
    """The largest batches of rows of the length that is asked for, the fastest first and then those that hold more
    tokens and cost more time; then the longest rows alike. What does not fit is left out."""
    batches, long_rows = [], []
    for taken in all_of(choices):

        def fit(rows: int, length: int, taken: Taken = taken) -> Fit:
            settings = {**asked.settings_of(rows, length), **taken.settings}
            choice, takes = price(settings), needs(settings)
            return Fit(choice.tokens // length, length, taken, settings, takes.device, choice, takes.host, takes.disk)

        def fits(rows: int, length: int, taken: Taken = taken) -> bool:
            return room.holds(needs({**asked.settings_of(rows, length), **taken.settings}))

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
    for one in sorted(found, key=lambda fit: (*cost(fit.choice, fit.taken), -fit.tokens, len(fit.settings))):
        if one.tokens > most:
            most = one.tokens
            yield one


@dataclass(frozen=True, slots=True)
class Remedy(Taken):
    """What makes a run fit, and what it takes then; `fits` False where it is the least that settings can do. `time` of
    a token is in units of what it takes with nothing done."""

    needs: Needs = Needs(0)
    fits: bool = True
    time: float = 1.0

    @property
    def high(self) -> int:
        """Of the device, with the margin."""
        return self.needs.device


def flag(path: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, tuple):
        value = ",".join(value)
    return f"--{path} {value}"


def remedy(needs: NeedsOf, price: PriceOf, room: Room, choices: Choices, length: int) -> Remedy:
    """The least costly combination of choices that fits. Shorter rows come last."""
    before = price({}).time

    def of(taken: Taken) -> Remedy:
        takes = needs(taken.settings)
        return Remedy(taken.steps, takes, room.holds(takes), price(taken.settings).time / before)

    ranked = by_cost(choices, price)
    for taken in ranked:
        if room.holds(needs(taken.settings)):
            return of(taken)
    least = ranked[room.least([needs(taken.settings) for taken in ranked])]
    most = (length - 1) // LENGTH_STEP
    steps = _largest(lambda steps: room.holds(needs({**least.settings, LENGTH: steps * LENGTH_STEP})), most)
    if (shorter := max(steps, 1) * LENGTH_STEP) < length:
        words = f"rows of up to {shorter} tokens"
        least = Taken((*least.steps, Step(words, {LENGTH: shorter}, "what of longer rows is beyond that is not seen")))
    return of(least)


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
