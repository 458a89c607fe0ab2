"""Rows made to fit `max_seq_length`, and rows with nothing to learn left out; both counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from qlora_hal.data.tokens.token_rows import Int64, TokenRows

Truncation = Literal["right", "left", "drop", "split"]
LISTED_ROWS = 20
"""So many row numbers are named per reason in a report."""
LONGEST_COUNTED = 2**17
"""Lengths are counted one by one up to here; longer rows share the last place."""


@dataclass(slots=True)
class FittingCounts:
    """What fitting did. `length_counts[n]` is how many rows had n tokens before anything was cut."""

    rows: int = 0
    too_long: int = 0
    answers_cut: int = 0
    split_into: int = 0
    dropped_too_long: int = 0
    dropped_untrained: int = 0
    all_tokens: int = 0
    trained_tokens: int = 0
    length_counts: Int64 = field(default_factory=lambda: np.zeros(LONGEST_COUNTED + 1, np.int64))
    too_long_rows: list[int] = field(default_factory=list)
    untrained_rows: list[int] = field(default_factory=list)


def fit(rows: TokenRows, limit: int, policy: Truncation, bos_id: int | None, counts: FittingCounts) -> TokenRows:
    """The rows with at most `limit` tokens each and at least one trained token each.

    `right` keeps the beginning of a long row, `left` its end behind the bos, `split` all of it in several rows, `drop`
    nothing.
    """
    counts.rows += len(rows.lengths)
    counts.length_counts += np.bincount(np.minimum(rows.lengths, LONGEST_COUNTED), minlength=LONGEST_COUNTED + 1)
    if len(rows.lengths) and int(rows.lengths.max()) > limit:
        rows = _shortened(rows, limit, policy, bos_id, counts)
    rows = _trained_only(rows, counts)
    counts.all_tokens += len(rows.ids)
    counts.trained_tokens += int(rows.trained.sum(dtype=np.int64))
    return rows


def _shortened(rows: TokenRows, limit: int, policy: Truncation, bos_id: int | None, counts: FittingCounts) -> TokenRows:
    starts = np.concatenate([[0], np.cumsum(rows.lengths)])
    chosen: list[Int64] = []
    sources: list[int] = []
    for row, length in enumerate(rows.lengths.tolist()):
        start = int(starts[row])
        if length <= limit:
            chosen.append(np.arange(start, start + length))
            sources.append(row)
            continue
        counts.too_long += 1
        if len(counts.too_long_rows) < LISTED_ROWS:
            counts.too_long_rows.append(int(rows.numbers[row]))
        has_bos = bos_id is not None and int(rows.ids[start]) == bos_id
        kept = list(_cuts(start, length, limit, policy, has_bos))
        counts.dropped_too_long += policy == "drop"
        counts.split_into += len(kept) if policy == "split" else 0
        if policy in ("right", "left"):
            lost = int(rows.trained[start : start + length].sum()) - int(rows.trained[kept[0]].sum())
            counts.answers_cut += lost > 0
        chosen += kept
        sources += [row] * len(kept)
    places = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    source = np.array(sources, np.int64)
    return _taken(rows, places, np.array([len(part) for part in chosen], np.int64), source)


def _cuts(start: int, length: int, limit: int, policy: Truncation, has_bos: bool) -> Iterator[Int64]:
    """Flat positions of what is kept of one long row."""
    if policy == "right":
        yield np.arange(start, start + limit)
    elif policy == "left" and has_bos and limit > 1:
        yield np.concatenate([[start], np.arange(start + length - limit + 1, start + length)])
    elif policy == "left":
        yield np.arange(start + length - limit, start + length)
    elif policy == "split":
        for first in range(0, length, limit):
            yield np.arange(start + first, start + min(first + limit, length))


def _trained_only(rows: TokenRows, counts: FittingCounts) -> TokenRows:
    if not len(rows.lengths):
        return rows
    starts = np.cumsum(rows.lengths) - rows.lengths
    trained = np.zeros(len(rows.lengths), np.int64)
    full = rows.lengths > 0
    trained[full] = np.add.reduceat(rows.trained, starts[full], dtype=np.int64)
    keep = trained > 0
    if keep.all():
        return rows
    counts.dropped_untrained += int((~keep).sum())
    # A row that was split is met once for each of its pieces.
    met = dict.fromkeys([*counts.untrained_rows, *rows.numbers[~keep].tolist()])
    counts.untrained_rows = list(met)[:LISTED_ROWS]
    places = np.flatnonzero(np.repeat(keep, rows.lengths))
    return _taken(rows, places, rows.lengths[keep], np.flatnonzero(keep))


def _taken(rows: TokenRows, places: Int64, lengths: Int64, source: Int64) -> TokenRows:
    trained: npt.NDArray[np.uint8] = rows.trained[places]
    begins = np.cumsum(lengths) - lengths
    trained[begins[lengths > 0]] = 0  # the first token of a row has nothing before it to be predicted from
    return TokenRows(rows.ids[places], trained, lengths, rows.numbers[source], rows.digests[source])
