"""What was read, used, dropped, cut and trained: the account that is printed before a run and stored with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from qlora_hal.data.tokens.token_rows import Int64

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of rows. All token figures are after truncation, `length_percentiles` and `histogram` before it.

    `shapes` counts rows by shape; `bad_rows` lists the first malformed rows as text; row numbers count from 1.
    `histogram` is (longest length in the bin, rows). `empty_turns` are assistant turns that say nothing; `alerts` are
    what of this the user is told at once. `plain` tells that every row was text as it stands, though there is a chat
    template. `parts` are the names of several sources in one, and `first_rows` the number of each one's first row.
    """

    source: str
    kind: str
    shapes: Mapping[str, int]
    evidence: str
    template: str
    rows_read: int
    rows_used: int
    sequences: int
    bad_row_count: int
    bad_rows: Sequence[str]
    dropped_too_long: int
    dropped_untrained: int
    untrained_rows: Sequence[int]
    too_long: int
    too_long_rows: Sequence[int]
    answers_cut: int
    split_into: int
    max_seq_length: int
    truncation: str
    all_tokens: int
    trained_tokens: int
    ended_rows: int
    eos_added_rows: int
    tokenizer_adds_bos: bool
    double_bos_rows: int
    special_in_text: Mapping[str, int]
    rows_with_special: int
    duplicate_rows: int
    unused_columns: Sequence[str]
    length_percentiles: Mapping[str, int]
    histogram: Sequence[Sequence[int]]
    empty_rows: int = 0
    empty_turns: int = 0
    notes: Sequence[str] = ()
    alerts: Sequence[str] = ()
    parts: Sequence[str] = ()
    first_rows: Sequence[int] = ()
    plain: bool = False

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> SourceReport:
        """The report that `as_json` gave. Raises KeyError, TypeError for anything else."""
        return cls(**{entry.name: value[entry.name] for entry in fields(cls)})  # type: ignore[arg-type]

    def lines(self) -> list[str]:
        """The report as lines of text."""
        shapes = ", ".join(f"{shape} {count}" for shape, count in self.shapes.items())
        lines = [
            f"source: {self.source} ({self.kind}); format: {shapes} ({self.evidence}); template: {self.template}",
            f"rows: {self.rows_used} of {self.rows_read} used{self._dropped()}",
            f"tokens: {self.trained_tokens} of {self.all_tokens} trained "
            f"({100 * self.trained_tokens / max(1, self.all_tokens):.1f} %)",
            "length in tokens: " + ", ".join(f"{name} {value}" for name, value in self.length_percentiles.items()),
            f"eos trained: {self.eos_trained} ({self.ended_rows} of {self.sequences} sequences end with it"
            + (f"; appended to {self.eos_added_rows} rows)" if self.eos_added_rows else ")"),
        ]
        if self.too_long:
            lines.append(
                f"over {self.max_seq_length} tokens: {self.too_long} rows ({self.truncation}); "
                f"answers cut: {self.answers_cut}; first rows: {_listed(self.too_long_rows)}"
            )
            lines += [f"  up to {edge:>6} tokens: {count} rows" for edge, count in self.histogram]
        if self.dropped_untrained:
            what = "pieces of rows" if self.truncation == "split" else "rows"
            listed = _listed(self.untrained_rows)
            lines.append(f"no trained token: {self.dropped_untrained} {what}; first rows: {listed}")
        lines += [f"bad row: {text}" for text in self.bad_rows]
        return [*lines, *self._remarks()]

    @property
    def eos_trained(self) -> str:
        """yes, no, or partly: whether the sequences end with a trained end token."""
        if self.ended_rows == self.sequences:
            return "yes"
        return "partly" if self.ended_rows else "no"

    def _dropped(self) -> str:
        reasons = {
            "malformed": self.bad_row_count,
            "empty": self.empty_rows,
            f"over {self.max_seq_length} tokens": self.dropped_too_long,
            f"{'pieces ' if self.truncation == 'split' else ''}without a trained token": self.dropped_untrained,
        }
        text = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        return f"; dropped: {text}" if text else ""

    def _remarks(self) -> list[str]:
        remarks = []
        if self.rows_with_special:
            met = ", ".join(f"{token} {count}" for token, count in self.special_in_text.items())
            remarks.append(
                f"special tokens written in messages, encoded as text: {met} (in {self.rows_with_special} rows)"
            )
        if self.double_bos_rows:
            remarks.append(f"bos appeared twice at the beginning of {self.double_bos_rows} rows; one was removed")
        if self.empty_turns:
            remarks.append(f"assistant turns without content, which carry no loss: {self.empty_turns}")
        if self.duplicate_rows:
            remarks.append(f"duplicate rows: {self.duplicate_rows}")
        if self.unused_columns:
            names = ", ".join(name or "''" for name in self.unused_columns)
            remarks.append(f"columns not used: {names}")
        return [*remarks, *self.notes, *self.alerts]


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What an epoch has of one of several sources: `rows` are those it holds, `rows_in_epoch` those of an epoch (on
    average, where rows are drawn in packs), `trained_tokens` their share of what an epoch trains. `effective_weight` is
    what is left of the weight where whole sequences are drawn, one at least."""

    source: str
    weight: float
    rows: int
    rows_in_epoch: int
    trained_tokens: float
    effective_weight: float

    @property
    def alert(self) -> str:
        """What to say where the weight cannot be kept; empty where it can."""
        if abs(self.effective_weight - self.weight) <= 0.05 * self.weight:
            return ""
        return (
            f"the weight {self.weight:g} of {self.source} is {self.effective_weight:.3g} in this run: an epoch has "
            "whole sequences (rows, or packs of them), and at least one of each source"
        )

    def line(self) -> str:
        return (
            f"of {self.source} (weight {self.weight:g}): {self.rows_in_epoch} rows in an epoch, of {self.rows}; "
            f"{100 * self.trained_tokens:.1f} % of the trained tokens"
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """The account of all data of a run. `leaked_rows` are validation rows whose text is also trained on.

    `packing_efficiency` is real tokens / (sequences x max_seq_length) of the packed sequences, if packed.
    """

    train: SourceReport
    validation: SourceReport | None = None
    train_sequences: int = 0
    validation_sequences: int = 0
    leaked_rows: int = 0
    packing_efficiency: float | None = None
    reused: bool = False
    notes: tuple[str, ...] = field(default=())
    sources: Sequence[SourceShare] = ()

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [*self.train.lines(), *(share.line() for share in self.sources)]
        if self.validation is not None:
            lines += [f"validation {line}" for line in self.validation.lines()]
        if self.validation_sequences:
            lines.append(
                f"training on {self.train_sequences} sequences, validating on {self.validation_sequences}; "
                f"validation rows that are also trained on: {self.leaked_rows}"
            )
        if self.packing_efficiency is not None:
            lines.append(f"packing: {100 * self.packing_efficiency:.1f} % of the positions hold tokens")
        return [*lines, *self.notes]

    @property
    def alerts(self) -> list[str]:
        """What the user is told even where no report is shown."""
        held = self.validation.alerts if self.validation else ()
        leaked = f"{self.leaked_rows} validation rows are also trained on; their loss says nothing about other rows"
        alerts = [*self.train.alerts, *(f"validation {text}" for text in held)]
        alerts += filter(None, (share.alert for share in self.sources))
        return [*alerts, leaked] if self.leaked_rows else alerts

    def __str__(self) -> str:
        return "\n".join(self.lines())


def percentiles_of(length_counts: Int64) -> dict[str, int]:
    """Percentiles of lengths from how often each occurs: the smallest length that covers the share."""
    total = int(length_counts.sum())
    if not total:
        return {}
    reached = np.cumsum(length_counts)
    return {f"p{share}": int(np.searchsorted(reached, max(1, total * share / 100))) for share in PERCENTILES}


def histogram_of(length_counts: Int64) -> list[list[int]]:
    """Rows by length, in bins that double: [longest length in the bin, rows]."""
    bins: list[list[int]] = []
    low, edge = 0, 16
    while low < len(length_counts):
        if count := int(length_counts[low : edge + 1].sum()):
            bins.append([min(edge, len(length_counts) - 1), count])
        low, edge = edge + 1, 2 * edge
    return bins


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))
