"""One source on its way to one token store, with the account of what happened to its rows.

Reading, rendering and masks run in this thread, the tokenizer's Rust threads beside it, a few chunks ahead.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.data.rendering import RowRenderer
from qlora_hal.data.report import SourceReport, histogram_of, percentiles_of
from qlora_hal.data.source.row_formats import EVIDENCE
from qlora_hal.data.source.rows import Row, Source
from qlora_hal.data.tokens.encoding import RenderedRow, RowEncoder
from qlora_hal.data.tokens.store import TokenStore, TokenWriter
from qlora_hal.data.tokens.token_rows import TokenRows
from qlora_hal.data.tokens.truncation import LISTED_ROWS, FittingCounts, fit
from qlora_hal.errors import DataError
from qlora_hal.errors.redaction import redacted

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_hal.config.schema import DataConfig
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer

CHUNK_ROWS, CHUNK_CHARACTERS = 1024, 2**21
CHUNKS_AHEAD = 3
_SKIPPABLE = frozenset({"QH-D03", "QH-D04", "QH-D07", "QH-D08", "QH-D12", "QH-D66"})


@dataclass(slots=True)
class _BadRows:
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.first) < LISTED_ROWS:
            self.first.append(f"{error.where}: {error.message}")


class Preparation:
    """One source on its way to one token store."""

    def __init__(self, source: Source, config: DataConfig, tokenizer: ChatTokenizer, vocabulary: int | None) -> None:
        self._source, self._config, self._tokenizer, self._vocabulary = source, config, tokenizer, vocabulary
        self._encoder = RowEncoder(tokenizer, train_on_all=config.train_on == "all")
        shape = None if config.format == "auto" else config.format
        self._renderer = RowRenderer(
            tokenizer,
            self._encoder,
            shape,
            last_turn_alone=config.train_on == "last",
            masks_reasoning=config.mask_reasoning,
        )
        self._fitting = FittingCounts()
        self._bad = _BadRows()
        self._stops = np.array(tokenizer.stop_ids, np.int32)
        self._read = self._used = self._ended = 0
        self._first_rows: list[int] = []
        self._text_files: dict[int, str] = {}

    def run(self, path: Path, fingerprint: str) -> tuple[TokenStore, SourceReport]:
        with TokenWriter(path) as writer:
            for rows in self._encoded():
                fitted = self._fit(rows)
                self._used += len(np.unique(fitted.numbers))
                writer.append(fitted)
            if not writer.rows:
                raise self._nothing_usable()
            report = self._report(writer.rows)
            store = writer.finish({"fingerprint": fingerprint, "report": json.dumps(redacted(report.as_json()))})
        return store, report

    def _encoded(self) -> Iterator[TokenRows]:
        """Chunks in order; while one is finished here, the tokenizer works on those behind it."""
        ahead: deque[tuple[list[RenderedRow], Future[list[Encoding | None]]]] = deque()
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize") as threads:
            for chunk in self._rendered():
                ahead.append((chunk, threads.submit(self._encoder.encode_texts, chunk)))
                if len(ahead) >= CHUNKS_AHEAD:
                    yield self._finished(*ahead.popleft())
            while ahead:
                yield self._finished(*ahead.popleft())

    def _rendered(self) -> Iterator[list[RenderedRow]]:
        chunk: list[RenderedRow] = []
        characters = 0
        for row in self._source.rows():
            self._read += 1
            while len(self._first_rows) <= row.part:
                self._first_rows.append(row.number)
            if row.file.lower().endswith(".txt"):
                self._text_files[row.number] = row.file
            try:
                rendered = self._renderer.render(row)
            except DataError as error:
                self._refuse_or_count(error, row)
                continue
            if rendered is None:
                continue
            chunk.append(rendered)
            characters += len(rendered.text)
            if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def _refuse_or_count(self, error: DataError, row: Row) -> None:
        error.context.setdefault("row", row.number)
        # Without any template every row of messages fails in the same way: that is no bad row, but a missing choice.
        no_choice = error.code == "QH-D12" and self._tokenizer.template is None
        if self._config.on_bad_row != "skip" or error.code not in _SKIPPABLE or no_choice:
            raise error
        self._bad.add(error)

    def _finished(self, rows: list[RenderedRow], encodings: Future[list[Encoding | None]]) -> TokenRows:
        tokens = self._encoder.finish(rows, encodings.result())
        if self._vocabulary is not None and len(tokens.ids) and int(tokens.ids.max()) >= self._vocabulary:
            raise _unknown_token(tokens, rows, self._vocabulary, self._tokenizer)
        return tokens

    def _fit(self, rows: TokenRows) -> TokenRows:
        config, tokenizer = self._config, self._tokenizer
        bos = tokenizer.bos_id if tokenizer.bos_id != tokenizer.eos_id else None
        self._refuse_cut_text(rows)
        fitted = fit(rows, config.max_seq_length, config.truncation, bos, self._fitting)
        if len(fitted.lengths):
            trained = np.flatnonzero(fitted.trained)
            last = trained[np.searchsorted(trained, np.cumsum(fitted.lengths)) - 1]
            self._ended += int(np.isin(fitted.ids[last], self._stops).sum())
        return fitted

    def _refuse_cut_text(self, rows: TokenRows) -> None:
        """Raise DataError QH-D67 for a text file of which only the beginning would be trained."""
        limit = self._config.max_seq_length
        if self._config.truncation != "right" or not self._text_files:
            return
        for number, length in zip(rows.numbers.tolist(), rows.lengths.tolist(), strict=True):
            if number in self._text_files and length > limit:
                raise DataError(
                    "QH-D67",
                    f"{self._text_files[number]} is one text of {length} tokens; with data.truncation right only the "
                    f"first {limit} of them would be trained.",
                    where="data.truncation",
                    fix="Set data.truncation to split, which trains all of it in pieces of data.max_seq_length tokens.",
                    context={"row": number, "tokens": length},
                )

    def _nothing_usable(self) -> DataError:
        fitting, limit = self._fitting, self._config.max_seq_length
        reasons = {
            f"{self._bad.count} malformed": self._bad.count,
            f"{self._renderer.counts.empty_rows} empty": self._renderer.counts.empty_rows,
            f"{fitting.dropped_too_long} over max length {limit}": fitting.dropped_too_long,
            f"{fitting.dropped_untrained} without a trained token": fitting.dropped_untrained,
        }
        counts = ", ".join(text for text, count in reasons.items() if count) or "the source is empty"
        untrained = fitting.dropped_untrained > max(self._bad.count, fitting.dropped_too_long)
        return DataError(
            "QH-D05" if untrained else "QH-D01",
            f"0 of {self._read} rows usable: {counts}.",
            where=self._source.name,
            cause=self._why_nothing(untrained),
            fix=self._way_on(),
            context={"rows_read": self._read, "bad_rows": self._bad.first},
        )

    def _way_on(self) -> str:
        if not self._read:
            return "Use a source that holds rows."
        if self._fitting.too_long:
            return "Raise data.max_seq_length, or correct the rows."
        if self._renderer.counts.omissions.lost_turns:
            return "Name a template that writes them in data.chat_template, or correct the rows."
        return "Correct the rows."

    def _why_nothing(self, untrained: bool) -> str:
        if not untrained:
            return self._bad.first[0] if self._bad.first else ""
        if self._fitting.too_long:
            return "The prompts alone fill max_seq_length, or no row has an assistant turn."
        if self._renderer.counts.omissions.lost_turns:
            return "; ".join(self._renderer.counts.omissions.lines())
        if excluded := self._renderer.counts.excluded_by:
            fields = ", ".join(f"{name} ({count} rows)" for name, count in sorted(excluded.items()))
            last = "; data.train_on is last, so that a row's other answers do not count" * (
                self._config.train_on == "last"
            )
            return f"The rows exclude answers from the loss by {fields}{last}."
        if turns := self._renderer.counts.unmarked_turns:
            return f"The chat template marks no part of {turns} turns of the assistant as trained ({{% generation %}})."
        return "No row has an assistant turn with content."

    def _report(self, sequences: int) -> SourceReport:
        config, fitting, rendering, encoding = self._config, self._fitting, self._renderer.counts, self._encoder.counts
        shapes = rendering.shapes
        return SourceReport(
            source=self._source.name,
            kind=self._source.kind,
            shapes=dict(shapes.most_common()),
            evidence="named by data.format"
            if config.format != "auto"
            else "; ".join(EVIDENCE[shape] for shape, _ in shapes.most_common()),
            template=self._tokenizer.template_name,
            plain=self._is_plain(),
            rows_read=self._read,
            rows_used=self._used,
            sequences=sequences,
            bad_row_count=self._bad.count,
            bad_rows=list(self._bad.first),
            dropped_too_long=fitting.dropped_too_long,
            dropped_untrained=fitting.dropped_untrained,
            untrained_rows=list(fitting.untrained_rows),
            too_long=fitting.too_long,
            too_long_rows=list(fitting.too_long_rows),
            answers_cut=fitting.answers_cut,
            split_into=fitting.split_into,
            max_seq_length=config.max_seq_length,
            truncation=config.truncation,
            all_tokens=fitting.all_tokens,
            trained_tokens=fitting.trained_tokens,
            ended_rows=self._ended,
            eos_added_rows=rendering.end_added_rows + encoding.eos_appended,
            tokenizer_adds_bos=self._tokenizer.adds_bos,
            double_bos_rows=encoding.double_bos_rows,
            special_in_text=dict((rendering.special_in_text + encoding.special_in_text).most_common()),
            rows_with_special=rendering.rows_with_special + encoding.rows_with_special,
            duplicate_rows=0,
            unused_columns=sorted(rendering.unused_columns),
            length_percentiles=percentiles_of(fitting.length_counts),
            histogram=histogram_of(fitting.length_counts),
            empty_rows=rendering.empty_rows,
            empty_turns=rendering.empty_turns,
            notes=self._notes(),
            alerts=self._alerts(),
            parts=list(self._source.parts),
            first_rows=[
                *self._first_rows,
                *[self._read + 1]
                * (len(self._source.parts) - len(self._first_rows)),  # of sources that end without a row
            ],
        )

    def _is_plain(self) -> bool:
        """Whether no row went through the chat template, and there is one."""
        counts = self._renderer.counts
        return self._tokenizer.template is not None and 0 < counts.plain_rows == sum(counts.shapes.values())

    def _alerts(self) -> list[str]:
        counts = self._renderer.counts
        listing = ", ".join(f"{name} ({count} rows)" for name, count in sorted(counts.unused_fields.items()))
        alerts = [*counts.omissions.lines(), *([f"message fields not used: {listing}"] if listing else [])]
        if counts.unmarked_turns:
            alerts.append(
                f"assistant turns that the template does not enclose in {{% generation %}}, without loss: "
                f"{counts.unmarked_turns}"
            )
        if self._config.mask_reasoning and not counts.masked_thoughts:
            alerts.append("data.mask_reasoning leaves nothing out: no trained part of a row holds marks of reasoning")
        if 0 < counts.plain_rows == sum(counts.shapes.values()):
            alerts += self._idle_without_conversations()
        if counts.unmasked_rows:
            alerts.append(
                f"data.mask_reasoning: the template writes reasoning between no marks that are known, and it carries "
                f"loss in {counts.unmasked_rows} rows; remove it from them, or name another data.chat_template"
            )
        if counts.special_read:
            met = ", ".join(f"{token} {count}" for token, count in counts.special_read.items())
            alerts.append(f"special tokens in messages that the template reads, encoded as tokens: {met}")
        return alerts

    def _idle_without_conversations(self) -> Iterator[str]:
        if self._config.chat_template is not None:
            yield "data.chat_template is not used: no row is a conversation"
        if self._config.train_on == "last":
            yield "data.train_on last leaves nothing out: no row is a conversation"

    def _notes(self) -> list[str]:
        counts = self._renderer.counts
        notes = list(self._source.notes)
        if len(counts.shapes) > 1:
            shapes = ", ".join(f"{shape} {number}" for shape, number in counts.shapes.most_common())
            notes.append(f"the rows have {len(counts.shapes)} formats: {shapes}")
        for (question, answer), number in counts.pairs.items():
            notes.append(
                f"the columns {question} and {answer} are read as instruction and output, a question and its answer, "
                f"in {number} rows; data.columns says otherwise where something else is meant"
            )
        if "alpaca" in counts.shapes and self._tokenizer.template is None:
            notes.append(
                "the tokenizer has no chat template; rows in the format alpaca use the built-in template alpaca"
            )
        if self._is_plain():
            notes.append(
                "all rows are text as it stands, without the chat template that the model has; generate and chat ask "
                "this run so, too. For questions and answers in its template: data.columns with instruction and output"
            )
        if counts.rows_with_tool_template:
            notes.append(f"{counts.rows_with_tool_template} rows with tools use the tokenizer's template tool_use")
        if counts.end_added_rows:
            notes.append(
                f"the template ends the last answer of {counts.end_added_rows} rows without an end token; "
                "one was appended"
            )
        if counts.empty_thoughts:
            notes.append(
                f"the template writes an empty <think></think> into {counts.empty_thoughts} answers; it is trained "
                "with them, so the model learns to answer without thinking"
            )
        if counts.masked_thoughts:
            notes.append(f"reasoning without loss, between its marks: in {counts.masked_thoughts} answers")
        for (form, why), number in counts.arguments_as.items():
            notes.append(f"the arguments of calls were given to the template as {form} in {number} rows: {why}")
        return notes


def _unknown_token(tokens: TokenRows, rows: list[RenderedRow], vocabulary: int, tokenizer: ChatTokenizer) -> DataError:
    place = int(np.argmax(tokens.ids >= vocabulary))
    row = rows[int(np.searchsorted(np.cumsum(tokens.lengths), place, side="right"))]
    number = int(tokens.ids[place])
    return DataError(
        "QH-D13",
        f"Row {row.number} holds token {number} ({tokenizer.decode([number], False)!r}); "
        f"the model has {vocabulary} tokens.",
        where=row.where,
        cause="The tokenizer has more tokens than the model's embedding.",
        fix="Use the tokenizer that belongs to the model.",
        context={"row": row.number, "token": number},
    )
