"""Where loss begins and ends in a row's tokens: read off its special tokens, or off character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Int32
from qlora_hal.data.tokens.token_rows import Int64, UInt8

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_hal.data.template.outlines import Outline
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Anchors:
    """How to find the targets of an outline among a row's special tokens.

    `specials` are the ids of all special tokens in order. Each target is (number of the special token before it, ids
    between that token and the target, number of the special token that ends it).
    """

    specials: Int64
    targets: tuple[tuple[int, tuple[int, ...], int], ...]


class Targets:
    """Token ranges that are trained: (row, first, one past last), counted from the row's beginning."""

    def __init__(self) -> None:
        self._rows: list[Int64] = []
        self._bounds: list[tuple[Int64, Int64]] = []

    def add(self, row: int, ranges: Sequence[tuple[int, int]]) -> None:
        pairs = np.array(ranges, np.int64).reshape(-1, 2)
        self.add_many(np.full(len(pairs), row), pairs[:, 0], pairs[:, 1])

    def add_many(self, rows: Int64, begins: Int64, ends: Int64) -> None:
        self._rows.append(rows)
        self._bounds.append((begins, ends))

    def places(self, starts: Int64) -> tuple[Int64, Int64]:
        """First and one-past-last positions in the flat array of all rows."""
        if not self._rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        offset = starts[np.concatenate(self._rows)]
        begins, ends = (np.concatenate(side) for side in zip(*self._bounds, strict=True))
        return offset + begins, offset + ends


def anchored(
    flat: Int32, places: Int64, first: Int64, last: Int64, anchors: Anchors
) -> tuple[npt.NDArray[np.bool_], list[tuple[Int64, Int64]]]:
    """(which rows have the anchors' special tokens and headings, flat bounds of each target in those rows).

    `places` are the flat positions of all special tokens; row i has those from `first[i]` to `last[i]`.
    """
    wanted = len(anchors.specials)
    good = (last - first) == wanted
    if len(places) < wanted:
        return np.zeros(len(good), dtype=bool), []
    grid = places[np.where(good, first, 0)[:, None] + np.arange(wanted)]  # [rows, specials]
    good &= (flat[grid] == anchors.specials).all(axis=1)
    for before, heading, _ in anchors.targets:
        for step, number in enumerate(heading, start=1):
            good &= flat[np.minimum(grid[:, before] + step, len(flat) - 1)] == number
    grid = grid[good]
    return good, [
        (grid[:, before] + 1 + len(heading), grid[:, closing] + 1) for before, heading, closing in anchors.targets
    ]


def mask_of(size: int, starts: Int64, targets: Targets, *, everything: bool) -> UInt8:
    """1 where a token is trained. The first token of a row never is: nothing stands before it to predict it from."""
    if everything:
        trained: UInt8 = np.ones(size, np.uint8)
    else:
        change = np.zeros(size + 1, np.int8)
        begins, ends = targets.places(starts)
        np.add.at(change, begins, 1)
        np.subtract.at(change, ends, 1)
        # Neighbouring pieces may share a token, which then counts twice here.
        trained = (np.cumsum(change[:-1], dtype=np.int8) > 0).view(np.uint8)
    beginnings = starts[:-1]
    trained[beginnings[beginnings < starts[1:]]] = 0
    return trained


def token_ranges(encoding: Encoding, pieces: Sequence[tuple[str, bool, bool]]) -> list[tuple[int, int]]:
    """Token ranges that cover the trained pieces. A token that reaches over a border into a target belongs to it."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    found: list[tuple[int, int]] = []
    at = 0
    for text, trained, _ in pieces:
        if trained and text:
            inside = np.flatnonzero((offsets[:, 0] < at + len(text)) & (offsets[:, 1] > at))
            if len(inside):
                found.append((int(inside[0]), int(inside[-1]) + 1))
        at += len(text)
    return found


def anchors_of(outline: Outline, tokenizer: ChatTokenizer) -> Anchors | None:
    """The anchors of an outline; None when a target does not lie between special tokens that the template writes."""
    special = tokenizer.special
    specials: list[int] = []
    targets: list[tuple[int, tuple[int, ...], int]] = []
    literal, inside, opening = "", False, (-1, "")
    closing: int | None = None
    for part, trained in [*outline.parts, ("", False)]:
        if trained and not inside:
            matches = list(special.pattern.finditer(literal))
            if not matches:
                return None
            opening, closing = (len(specials) - 1, literal[matches[-1].start() :]), None
        if inside and not trained:
            if closing is None:
                return None
            targets.append((opening[0], _heading(opening[1], tokenizer), closing))
        inside = trained
        if not isinstance(part, str):
            literal, closing = "", None
            continue
        literal += part
        end = 0
        for match in special.pattern.finditer(part):
            specials.append(special.ids[match.group()])
            end = match.end()
        if trained and part:
            closing = len(specials) - 1 if end == len(part) else None
    return Anchors(np.array(specials, np.int64), tuple(targets)) if specials else None


def _heading(text: str, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Ids of the literal text between a special token (with which `text` begins) and a target."""
    return tuple(tokenizer.encode(text)[1:])
