"""Several sources as one, and which of their sequences an epoch has: a pure function of (seed, epoch).

The weight of a source is how often an epoch has each of its sequences. With weight 2 an epoch has each twice; with 0.5
it has half of them, the next epoch the other half, then both halves are drawn anew. So no source depends on the others,
every epoch has the same number of steps, and over many epochs no sequence is seen more than once more often than
another of its source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np

from qlora_hal.data.source.rows import Row, Source
from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.data.tokens.token_rows import Int64
from qlora_hal.errors import ConfigError
from qlora_hal.files.refused_paths import named_path

Share = tuple[int, float]
"""The number of a source's first row, and its weight."""

ALL_ONCE: tuple[Share, ...] = ((1, 1.0),)


def refuse_same_rows(sources: Sequence[Source], places: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError QH-U01 where a file is read for two sources, under whatever names, or a folder's split is.
    `places` are path and split of each."""
    first_of: dict[object, int] = {}
    for number, (source, (path, split)) in enumerate(zip(sources, places, strict=True)):
        files: list[object] = [(file.stat().st_dev, file.stat().st_ino) for file in source.files]
        for rows in files or [(os.path.realpath(named_path(path)), split)]:
            if (first := first_of.setdefault(rows, number)) != number:
                raise ConfigError(
                    "QH-U01",
                    f"data.sources names the same rows twice: as {places[first][0]!r} and as {path!r}.",
                    where=f"data.sources[{number}].path",
                    cause="They would be read twice, held out apart, and counted as two sources.",
                    fix="Leave one of them, and give it a weight.",
                )


def one_after_another(sources: Sequence[Source]) -> Source:
    """The rows of all sources, numbered through; `part` of a row says which source it is of."""

    def rows() -> Iterator[Row]:
        numbers = count(1)
        for part, source in enumerate(sources):
            for row in source.rows():
                yield row._replace(number=next(numbers), part=part)

    def digest() -> str:
        return hashlib.sha256("\n".join(source.digest() for source in sources).encode()).hexdigest()

    return Source(
        ", ".join(source.name for source in sources),
        "+".join(sorted({source.kind for source in sources})),
        rows,
        digest,
        lambda: [source.stamp() for source in sources],
        tuple(note for source in sources for note in source.notes),
        tuple(alert for source in sources for alert in source.alerts),
        tuple(source.name for source in sources),
    )


def beginning(source: Source, rows: int) -> Source:
    """The first `rows` rows of a source; nothing behind them is read."""
    return replace(
        source,
        rows=lambda: islice(source.rows(), rows),
        digest=lambda: hashlib.sha256(f"{source.digest()} {rows}".encode()).hexdigest(),
        notes=(*source.notes, f"of {source.name} no more than the first {rows} rows are read (data.max_rows)"),
    )


def source_of_rows(row_numbers: Int64, shares: Sequence[Share]) -> Int64:
    """Which source each row is of, `[rows]`, counted from 0."""
    first_rows = np.array([first for first, _ in shares], np.int64)
    return np.maximum(np.searchsorted(first_rows, row_numbers, side="right").astype(np.int64) - 1, 0)


def sequences_in_epoch(size: int, weight: float) -> int:
    """How many sequences an epoch has of a source that holds `size`: at least one, if it holds any."""
    return max(min(size, 1), round(size * weight))


def drawn(size: int, weight: float, *, source: int, seed: int, epoch: int, shuffle: bool) -> Int64:
    """The sequences (of 0 to `size` - 1) that an epoch has of a source: the next of an endless row of passes over all,
    each pass in an order of its own."""
    wanted = sequences_in_epoch(size, weight)
    if not wanted or wanted % size == 0:
        return np.tile(np.arange(size), wanted // max(size, 1))
    first = epoch * wanted
    passes = range(first // size, (first + wanted - 1) // size + 1)
    orders = [
        permutation(size, seed, Purpose.MIXTURE, (source << 32) + number) if shuffle else np.arange(size)
        for number in passes
    ]
    start = first - passes.start * size
    chosen: Int64 = np.concatenate(orders)[start : start + wanted]
    return chosen
