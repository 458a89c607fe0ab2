"""From rendered rows to token ids and the mask of what is trained, a chunk of rows at a time.

Ids always come from encoding the whole text of a row, so they are those of `apply_chat_template(tokenize=True)`.
Where loss begins and ends is read off the special tokens, for all rows of one outline at once; a row whose special
tokens are not exactly those of its outline (someone wrote one in a message, or a heading merged with the text behind
it) is encoded again with character offsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.contract.values import Int32
from qlora_hal.data.template.outlines import Outline
from qlora_hal.data.tokens.loss_spans import Targets, anchored, anchors_of, mask_of, token_ranges
from qlora_hal.data.tokens.token_rows import Int64, TokenRows

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_hal.data.tokens.tokenizer import ChatTokenizer


@dataclass(slots=True)
class RenderedRow:
    """One row as text. Exactly one of `outline` (with `contents`) and `pieces` says what is trained.

    A piece is (text, trained, whether a person wrote it). `is_writing` rows get bos and eos here; `protected` pieces
    carry aliases for the template's special tokens.
    """

    number: int
    where: str
    text: str
    digest: bytes
    outline: Outline | None = None
    contents: Sequence[str] = ()
    pieces: list[tuple[str, bool, bool]] = field(default_factory=list)
    is_writing: bool = False
    protected: bool = False


@dataclass(slots=True)
class EncodingCounts:
    """What encoding changed or met, for the report."""

    special_in_text: Counter[str] = field(default_factory=Counter)
    rows_with_special: int = 0
    double_bos_rows: int = 0
    eos_appended: int = 0
    unanchored_rows: int = 0


class RowEncoder:
    """Encodes chunks of rows. `encode_texts` may run in another thread; `finish` belongs to one."""

    def __init__(self, tokenizer: ChatTokenizer, *, train_on_all: bool) -> None:
        self._tokenizer = tokenizer
        self.train_on_all = train_on_all
        self._is_special = np.zeros(tokenizer.vocabulary_size, dtype=bool)
        self._is_special[list(tokenizer.special.ids.values())] = True
        self.counts = EncodingCounts()

    def prepare_outline(self, outline: Outline) -> None:
        """Give an outline its anchors, if its targets lie between special tokens."""
        outline.anchors, outline.anchored = anchors_of(outline, self._tokenizer), True

    def encode_texts(self, rows: Sequence[RenderedRow]) -> list[Encoding | None]:
        """Encodings of the rows, with offsets where targets are found by them; None for rows whose text is still to be
        changed. The Rust threads work without the lock."""
        found: list[Encoding | None] = [None] * len(rows)
        for offsets in (False, True):
            places = [place for place, row in enumerate(rows) if self._needs_offsets(row) is offsets]
            encodings = self._tokenizer.encode_batch([rows[place].text for place in places], offsets=offsets)
            for place, encoding in zip(places, encodings, strict=True):
                found[place] = encoding
        return found

    def finish(self, rows: Sequence[RenderedRow], encodings: Sequence[Encoding | None]) -> TokenRows:
        """Ids and masks of a chunk, in row order."""
        ids: list[list[int]] = []
        targets = Targets()
        groups: dict[int, list[int]] = {}
        for index, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            if encoding is not None and row.outline is not None:
                groups.setdefault(id(row.outline), []).append(index)
                ids.append(encoding.ids)
                continue
            if encoding is None:
                found, ranges = self._with_offsets(row)
            else:
                found, ranges = encoding.ids, self._ranges(row, encoding)
            if row.is_writing:
                found, ranges = self._with_ends(found, ranges)
            targets.add(index, ranges)
            ids.append(found)
        flat, starts = _flat(ids)
        failed = self._anchored_targets(rows, groups, flat, starts, targets)
        if failed:
            for index in failed:
                self.counts.unanchored_rows += 1
                ids[index], ranges = self._with_offsets(rows[index])
                targets.add(index, ranges)
            flat, starts = _flat(ids)
        trained = mask_of(len(flat), starts, targets, everything=self.train_on_all)
        tokens = TokenRows(
            flat,
            trained,
            np.diff(starts),
            np.fromiter((row.number for row in rows), np.int64, len(rows)),
            np.frombuffer(b"".join([row.digest for row in rows]), np.uint64),
        )
        return self._without_double_bos(tokens, starts)

    def _needs_offsets(self, row: RenderedRow) -> bool | None:
        """Whether the offsets of the row's characters are needed; None where its text is encoded in another form."""
        if row.outline is not None:
            return False if row.outline.anchors is not None else None
        return None if row.protected else not self._is_all_trained(row)

    def _is_all_trained(self, row: RenderedRow) -> bool:
        return (len(row.pieces) == 1 and row.pieces[0][1]) or (self.train_on_all and row.is_writing)

    def _ranges(self, row: RenderedRow, encoding: Encoding) -> list[tuple[int, int]]:
        return [(0, len(encoding.ids))] if self._is_all_trained(row) else token_ranges(encoding, row.pieces)

    # targets between special tokens -------------------------------------------------------------------------------
    def _anchored_targets(
        self,
        rows: Sequence[RenderedRow],
        groups: Mapping[int, list[int]],
        flat: Int32,
        starts: Int64,
        targets: Targets,
    ) -> list[int]:
        """Find the targets of all rows with anchors; the rows whose special tokens are not those of their outline."""
        places = np.flatnonzero(self._is_special[flat])
        bounds = np.searchsorted(places, starts)
        failed: list[int] = []
        for group in groups.values():
            outline = rows[group[0]].outline
            assert outline is not None
            assert outline.anchors is not None
            members = np.array(group, np.int64)
            good, found = anchored(flat, places, bounds[members], bounds[members + 1], outline.anchors)
            failed += members[~good].tolist()
            fitting = members[good]
            for begins, ends in found:
                targets.add_many(fitting, begins - starts[fitting], ends - starts[fitting])
        return failed

    # targets by character offsets ---------------------------------------------------------------------------------
    def _with_offsets(self, row: RenderedRow) -> tuple[list[int], list[tuple[int, int]]]:
        special = self._tokenizer.special
        pieces = row.pieces if row.outline is None else row.outline.pieces(row.contents)
        protected = row.protected
        if not protected and not row.is_writing:
            met = special.found_in(text for text, _, human in pieces if human)
            if met:
                self.counts.special_in_text.update(met)
                self.counts.rows_with_special += 1
                pieces = [(text if human else special.alias(text), trained, human) for text, trained, human in pieces]
                protected = True
        text = "".join(text for text, _, _ in pieces)
        if protected:
            ids, encoding = self._tokenizer.encode_protected(text)
        else:
            encoding = self._tokenizer.encode_batch([text])[0]
            ids = encoding.ids
        return ids, token_ranges(encoding, pieces)

    def _with_ends(self, ids: list[int], ranges: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Text that is trained as it stands gets what its tokenizer opens with, and an eos; neither twice."""
        tokenizer, opening = self._tokenizer, self._tokenizer.opening_ids
        if opening:
            if ids[: len(opening)] == [*opening]:
                self.counts.double_bos_rows += 1
            else:
                ids = [*opening, *ids]
                ranges = [(start + len(opening), stop + len(opening)) for start, stop in ranges]
        if ids[-1:] != [tokenizer.eos_id]:
            self.counts.eos_appended += 1
            ranges = [*ranges, (len(ids), len(ids) + 1)]
            ids = [*ids, tokenizer.eos_id]
        return ids, ranges

    def _without_double_bos(self, rows: TokenRows, starts: Int64) -> TokenRows:
        bos = self._tokenizer.bos_id
        if bos == self._tokenizer.eos_id or len(rows.ids) < 2:
            return rows
        first = starts[:-1]
        twice = (rows.lengths > 1) & (rows.ids[np.minimum(first, len(rows.ids) - 1)] == bos)
        twice &= rows.ids[np.minimum(first + 1, len(rows.ids) - 1)] == bos
        if not twice.any():
            return rows
        self.counts.double_bos_rows += int(twice.sum())
        keep = np.ones(len(rows.ids), dtype=bool)
        keep[first[twice]] = False
        trained = rows.trained[keep]
        lengths = rows.lengths - twice
        begins = np.cumsum(lengths) - lengths
        trained[begins[lengths > 0]] = 0
        return TokenRows(rows.ids[keep], trained, lengths, rows.numbers, rows.digests)


def _flat(ids: Sequence[list[int]]) -> tuple[Int32, Int64]:
    """Rows of ids in one array, and where each begins, with the end of the last."""
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(row) for row in ids], out=starts[1:])
    return np.fromiter(chain.from_iterable(ids), np.int32, int(starts[-1])), starts
