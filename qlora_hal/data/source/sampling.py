"""Which rows make up which optimizer step: a pure function of (seed, epoch, step).

There is no iterator and no state to save. A resumed run asks for step 317 and gets what it would have got without the
interruption, on any backend and with any split over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from qlora_hal.contract.values import Batch
from qlora_hal.contract.world import World
from qlora_hal.data.source.mixture import ALL_ONCE, Share, drawn, source_of_rows
from qlora_hal.data.tokens.batching import batch_of, without_labels
from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.data.tokens.packing import packs_of
from qlora_hal.data.tokens.store import TokenStore
from qlora_hal.data.tokens.token_rows import Int64
from qlora_hal.errors import DataError

WINDOWS_PER_BUCKET = 32
"""So many random windows are sorted by length together; enough to save most padding, few enough to stay random."""


class WindowSampler:
    """The windows of a run.

    A *sequence* is one row, or one pack of rows. An epoch has every sequence once. Its global window k is the k-th
    group of `batch_size * accumulation * world.size` sequences of the epoch's order; the last one may be smaller and is
    used like the others, weighted by its tokens. Packs are formed once for all epochs, of the rows of one source (rows
    in a pack do not see each other, so their company carries nothing), hence every epoch has `steps_per_epoch` steps.

    Of several sources an epoch has as many sequences as their weights say (`shares`, see mixture.py).

    With `group_by_length`, the random order is cut into buckets of 32 windows; inside a bucket sequences are
    sorted by length and the resulting windows are put in random order. Without `shuffle` the order is that of the
    source, and grouping only arranges the sequences of a window among its micro-batches.

    Which rows a window holds depends on the product of batch size, accumulation and ranks, not on the factors. With
    `tokens_per_batch` it is cut into micro-batches by their tokens instead: as many sequences, in their order, as have
    no more than that with their padding. The step is the same; of short rows it takes fewer micro-batches.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool,
        group_by_length: bool,
        packing: bool,
        max_seq_length: int,
        pad_id: int,
        pad_to_multiple: int = 8,
        tokens_per_batch: int | None = None,
        world: World | None = None,
        shares: Sequence[Share] = ALL_ONCE,
    ) -> None:
        """Raises DataError: QH-D01 for a store without rows, QH-D05 for a row that nothing can be learnt from."""
        _refuse_unusable(store)
        self._store, self._seed, self._shuffle, self._grouped = store, seed, shuffle, group_by_length
        self._batch_size, self._world = batch_size, world or World()
        self._pad_id, self._pad_to_multiple = pad_id, pad_to_multiple
        self._tokens_per_batch = tokens_per_batch
        self._window_size = batch_size * accumulation * self._world.size
        self._weights = [weight for _, weight in shares]
        source = source_of_rows(store.row_numbers, shares)
        rows_by_source = [np.flatnonzero(source == number) for number in range(len(shares))]
        packed = partial(packs_of, lengths=store.lengths, capacity=max_seq_length, seed=seed, shuffle=shuffle)
        packs_by_source = list(map(packed, rows_by_source)) if packing else None
        self._packs = None if packs_by_source is None else [pack for packs in packs_by_source for pack in packs]
        self._sources = rows_by_source if packs_by_source is None else _counted_through(map(len, packs_by_source))
        self._lengths = self._sequence_lengths()
        self._order: tuple[int, Int64] = (-1, np.zeros(0, np.int64))
        # What a step asks for may be beyond all numbers of an array; a window has no more than all sequences.
        self._asked = self._window_size
        self.sequences = len(self._of_epoch(0))
        """Sequences in an epoch: rows, or packs of them."""
        self._window_size = min(self._asked, self.sequences)
        self.steps_per_epoch = -(-self.sequences // self._window_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the windows."""
        if self.sequences >= self._asked:
            return ()
        return (
            f"{self.sequences} sequences are fewer than the {self._asked} of one step; "
            "each step has all of them, in a smaller last batch",
        )

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of a run; a part of a step at the end of the last epoch is a whole one."""
        # 0.1 * 30 is 3.0000000000000004: an excess of rounding is not a step.
        return max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def epoch_of(self, step: int) -> float:
        """Epochs done before a step."""
        return step / self.steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step on average, without padding."""
        return float(self._lengths[self._of_epoch(0)].sum()) / self.steps_per_epoch

    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step (from 0, over the whole run); at least one."""
        groups = self._micro_batches(step)
        places = accumulate(map(len, groups), initial=0)
        mine = list(zip(groups, places, strict=False))[self._world.rank :: self._world.size]
        if not mine:
            # Every rank takes part in the reduction; this one with tokens that carry no loss.
            return [without_labels(self._batch(groups[0], 0))]
        return [self._batch(group, place) for group, place in mine]

    def token_count(self, step: int) -> int:
        """Counted tokens of the global window, over all ranks."""
        return int(self._store.counted[self._rows(step)].sum(dtype=np.int64))

    def real_tokens(self, step: int) -> int:
        """Tokens of the global window that are not padding, over all ranks."""
        return int(self._store.lengths[self._rows(step)].sum(dtype=np.int64))

    def rows_of(self, step: int) -> list[int]:
        """Source row numbers (from 1) of the global window."""
        numbers: list[int] = np.unique(self._store.row_numbers[self._rows(step)]).tolist()
        return numbers

    # order ---------------------------------------------------------------------------------------------------------
    def _micro_batches(self, step: int) -> list[Int64]:
        """The global window, cut into micro-batches of all ranks; similar lengths together when grouped."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        chosen = order[place * self._window_size : (place + 1) * self._window_size]
        if self._grouped:
            chosen = chosen[np.argsort(-self._lengths[chosen], kind="stable")]
        if self._tokens_per_batch is None:
            return [chosen[at : at + self._batch_size] for at in range(0, len(chosen), self._batch_size)]
        return list(self._filled(chosen, self._tokens_per_batch))

    def _filled(self, chosen: Int64, tokens: int) -> Iterator[Int64]:
        """Cut where one more sequence would make a micro-batch of more tokens; a sequence above them is alone."""
        begin = width = 0
        for place, length in enumerate(self._lengths[chosen].tolist()):
            padded = -(-length // self._pad_to_multiple) * self._pad_to_multiple
            if place > begin and (place - begin + 1) * max(width, padded) > tokens:
                yield chosen[begin:place]
                begin, width = place, 0
            width = max(width, padded)
        yield chosen[begin:]

    def _epoch_order(self, epoch: int) -> Int64:
        known, order = self._order
        if known != epoch:
            order = self._ordered(epoch)
            self._order = (epoch, order)
        return order

    def _of_epoch(self, epoch: int) -> Int64:
        """The sequences that an epoch has, source after source."""
        return np.concatenate(
            [
                sequences[drawn(len(sequences), weight, source=n, seed=self._seed, epoch=epoch, shuffle=self._shuffle)]
                for n, (sequences, weight) in enumerate(zip(self._sources, self._weights, strict=True))
            ]
        )

    def _ordered(self, epoch: int) -> Int64:
        order = self._of_epoch(epoch)
        if not self._shuffle:
            return order
        count = len(order)
        order = order[permutation(count, self._seed, Purpose.ROWS, epoch)]
        if not self._grouped:
            return order
        bucket = np.arange(count) // (WINDOWS_PER_BUCKET * self._window_size)
        order = order[np.lexsort((self._lengths[order], bucket))]
        return np.take(order, _windows_shuffled(count, self._window_size, self._seed, epoch))

    def _sequence_lengths(self) -> Int64:
        lengths = self._store.lengths
        if self._packs is None:
            return lengths
        return np.array([int(lengths[rows].sum()) for rows in self._packs], np.int64)

    def _rows(self, step: int) -> Int64:
        return np.array([row for group in self._micro_batches(step) for row in self._rows_in(group)], np.int64)

    def _rows_in(self, group: Int64) -> list[int]:
        if self._packs is None:
            return [int(row) for row in group]
        return [row for sequence in group for row in self._packs[sequence]]

    def _batch(self, group: Int64, first: int) -> Batch:
        """The micro-batch whose first row has the place `first` in the global window."""
        packs = self._packs
        sequences = [[int(row)] for row in group] if packs is None else [packs[sequence] for sequence in group]
        batch = batch_of(self._store, sequences, pad_id=self._pad_id, pad_to_multiple=self._pad_to_multiple)
        return replace(batch, rows=np.arange(first, first + len(sequences), dtype=np.int32))


def evaluation_batches(
    store: TokenStore, batch_size: int, *, pad_id: int, pad_to_multiple: int = 8, world: World | None = None
) -> Iterator[Batch]:
    """All rows once, in a fixed order: the longest first, so that a batch too large for the memory shows at once.

    With several ranks, this rank's share.
    """
    world = world or World()
    order = np.argsort(-store.lengths, kind="stable")
    for at in range(world.rank * batch_size, len(order), world.size * batch_size):
        sequences = [[int(row)] for row in order[at : at + batch_size]]
        yield batch_of(store, sequences, pad_id=pad_id, pad_to_multiple=pad_to_multiple)


def _counted_through(counts: Iterable[int]) -> list[Int64]:
    """For sets of so many sequences each, their numbers where all are counted through."""
    bounds = np.cumsum([0, *counts])
    return [np.arange(first, last) for first, last in pairwise(bounds)]


def _windows_shuffled(count: int, window: int, seed: int, epoch: int) -> Int64:
    """Places 0 to `count` - 1 with their full windows in random order; a last, partial window stays last."""
    full = count // window
    windows = permutation(full, seed, Purpose.WINDOWS, epoch)
    places = (windows[:, None] * window + np.arange(window)).reshape(-1)
    return np.concatenate([places, np.arange(full * window, count)])


def _refuse_unusable(store: TokenStore) -> None:
    if not len(store):
        raise DataError("QH-D01", "There is no row to train on.", fix="Use a source that holds rows.")
    untrained = np.flatnonzero(store.counted == 0)
    if len(untrained):
        numbers = ", ".join(str(store.row_numbers[row]) for row in untrained[:10])
        raise DataError(
            "QH-D05",
            f"{len(untrained)} of {len(store)} rows have no trained token (row {numbers}).",
            fix="Prepare the data again; such rows are left out there.",
        )
