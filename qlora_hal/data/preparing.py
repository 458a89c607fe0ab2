"""The whole way from what the user named to token stores and an account of them.

Reading, rendering and masks run in this thread, the tokenizer's Rust threads beside it, a few chunks ahead. What was
prepared once is found again by a fingerprint over the rows' bytes, the tokenizer and the settings that matter.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.data.data_report import DataReport, SourceReport, histogram_of, percentiles_of
from qlora_hal.data.encoding import RenderedRow, RowEncoder, TokenRows
from qlora_hal.data.fitting import LISTED_ROWS, FittingCounts, fit
from qlora_hal.data.order import Purpose, permutation
from qlora_hal.data.packing import pack
from qlora_hal.data.reading import Row, Source, memory_source, open_source
from qlora_hal.data.rendering import RowRenderer
from qlora_hal.data.shapes import EVIDENCE
from qlora_hal.data.tokens import NotAStore, TokenStore, TokenWriter, open_store
from qlora_hal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_hal.config import DataConfig
    from qlora_hal.data.tokenizer import ChatTokenizer

CHUNK_ROWS, CHUNK_CHARACTERS = 1024, 2**21
CHUNKS_AHEAD = 3
_SKIPPABLE = frozenset({"QH-D03", "QH-D04", "QH-D07", "QH-D08", "QH-D12"})
_VERSION = 1


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows ready to be trained on. `fingerprint` changes when any token, mask or row could."""

    train: TokenStore
    validation: TokenStore | None
    report: DataReport
    fingerprint: str


def prepare(
    config: DataConfig,
    tokenizer: ChatTokenizer,
    *,
    cache_dir: Path,
    seed: int,
    rows: Sequence[Mapping[str, object]] | None = None,
    model_max_length: int | None = None,
    model_vocabulary_size: int | None = None,
) -> PreparedData:
    """Read, render, tokenise and account for the data of a run; `rows` take the place of `config.path`.

    Raises DataError (faults D01-D16 of the catalogue), HubError, StorageError (QH-S09), and ConfigError (QH-D54) when
    `max_seq_length` is above what the model was made for.
    """
    _refuse_long_sequences(config, model_max_length)
    source = memory_source(rows) if rows is not None else open_source(config.path, config.split)
    train, report, fingerprint = _tokenised(source, config, tokenizer, cache_dir, model_vocabulary_size)
    validation, validation_report, parts = None, None, [fingerprint]
    if config.validation_path:
        held = open_source(config.validation_path, config.split)
        validation, validation_report, second = _tokenised(held, config, tokenizer, cache_dir, model_vocabulary_size)
        parts.append(second)
    elif config.validation_fraction:
        train, validation = hold_out(train, config.validation_fraction, seed)
        parts.append(f"{config.validation_fraction} {seed}")
    whole = DataReport(
        report,
        validation_report,
        train_sequences=len(train),
        validation_sequences=0 if validation is None else len(validation),
        leaked_rows=0 if validation is None else _leaked(train, validation),
        packing_efficiency=_packing_efficiency(train, config),
        notes=tokenizer.notes,
    )
    return PreparedData(train, validation, whole, hashlib.sha256("\n".join(parts).encode()).hexdigest())


def hold_out(store: TokenStore, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """(training rows, validation rows). Rows with the same text, and pieces of one row, stay on one side.

    Raises DataError (QH-D01) when that leaves nothing to train on.
    """
    texts, group = np.unique(store.digests, return_inverse=True)
    sizes = np.bincount(group, minlength=len(texts))
    if len(texts) < 2:
        raise DataError(
            "QH-D01",
            f"All {len(store)} usable rows have the same text; none can be held out for validation.",
            where="data.validation_fraction",
            fix="Give more rows, or name a file in data.validation_path.",
        )
    # np.unique sorts by digest, which says nothing of the place in the file; the order is drawn over that.
    order = permutation(len(texts), seed, Purpose.HOLD_OUT)
    wanted = max(1, round(len(store) * fraction))
    count = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = np.zeros(len(texts), dtype=bool)
    chosen[order[: min(count, len(texts) - 1)]] = True
    held = chosen[group]
    return store.subset(np.flatnonzero(~held)), store.subset(np.flatnonzero(held))


def _refuse_long_sequences(config: DataConfig, model_max_length: int | None) -> None:
    if model_max_length is not None and config.max_seq_length > model_max_length:
        raise ConfigError(
            "QH-D54",
            f"data.max_seq_length is {config.max_seq_length}; this model has positions up to {model_max_length}.",
            where="data.max_seq_length",
            fix=f"Set data.max_seq_length to {model_max_length} or less.",
        )


def _tokenised(
    source: Source, config: DataConfig, tokenizer: ChatTokenizer, cache_dir: Path, vocabulary: int | None
) -> tuple[TokenStore, SourceReport, str]:
    """The token store of one source, from the cache if it is there, with its report and fingerprint."""
    stamp = source.stamp()
    fingerprint = _fingerprint(source, config, tokenizer, vocabulary)
    path = cache_dir / f"{fingerprint[:32]}.safetensors"
    found = _from_cache(path, fingerprint)
    if found is None:
        store, report = _Preparation(source, config, tokenizer, vocabulary).run(path, fingerprint)
        if source.stamp() != stamp:
            path.unlink(missing_ok=True)
            raise DataError(
                "QH-D16",
                f"The data {source.name!r} changed while it was read.",
                where="data.path",
                fix="Wait until the file is written, then start again.",
            )
        found = store, report
    store, report = found
    return store, replace(report, source=source.name, duplicate_rows=_duplicates(store)), fingerprint


def _fingerprint(source: Source, config: DataConfig, tokenizer: ChatTokenizer, vocabulary: int | None) -> str:
    settings = [config.format, config.train_on, config.max_seq_length, config.truncation, config.on_bad_row]
    parts = [_VERSION, source.digest(), source.kind, tokenizer.hash, tokenizer.template_name, vocabulary, *settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _from_cache(path: Path, fingerprint: str) -> tuple[TokenStore, SourceReport] | None:
    try:
        store, metadata = open_store(path)
        if metadata.get("fingerprint") != fingerprint:
            return None
        return store, SourceReport.from_json(json.loads(metadata["report"]))
    except (OSError, NotAStore, ValueError, KeyError, TypeError):
        return None  # absent, cut off, or of another release: it is prepared again


@dataclass(slots=True)
class _BadRows:
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.first) < LISTED_ROWS:
            self.first.append(f"{error.where}: {error.message}")


class _Preparation:
    """One source on its way to one token store."""

    def __init__(self, source: Source, config: DataConfig, tokenizer: ChatTokenizer, vocabulary: int | None) -> None:
        self._source, self._config, self._tokenizer, self._vocabulary = source, config, tokenizer, vocabulary
        self._encoder = RowEncoder(tokenizer, train_on_all=config.train_on == "all")
        shape = None if config.format == "auto" else config.format
        self._renderer = RowRenderer(tokenizer, self._encoder, shape)
        self._fitting = FittingCounts()
        self._bad = _BadRows()
        self._stops = np.array(tokenizer.stop_ids, np.int32)
        self._read = self._used = self._ended = 0

    def run(self, path: Path, fingerprint: str) -> tuple[TokenStore, SourceReport]:
        with TokenWriter(path) as writer:
            for rows in self._encoded():
                fitted = self._fit(rows)
                self._used += len(np.unique(fitted.numbers))
                writer.append(fitted)
            if not writer.rows:
                raise self._nothing_usable()
            report = self._report(writer.rows)
            store = writer.finish({"fingerprint": fingerprint, "report": json.dumps(report.as_json())})
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
            try:
                rendered = self._renderer.render(row)
            except DataError as error:
                self._refuse_or_count(error, row)
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
        fitted = fit(rows, config.max_seq_length, config.truncation, bos, self._fitting)
        if len(fitted.lengths):
            trained = np.flatnonzero(fitted.trained)
            last = trained[np.searchsorted(trained, np.cumsum(fitted.lengths)) - 1]
            self._ended += int(np.isin(fitted.ids[last], self._stops).sum())
        return fitted

    def _nothing_usable(self) -> DataError:
        fitting, limit = self._fitting, self._config.max_seq_length
        reasons = {
            f"{self._bad.count} malformed": self._bad.count,
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
            fix="Raise data.max_seq_length, or correct the rows." if self._read else "Give a source that holds rows.",
            context={"rows_read": self._read, "bad_rows": self._bad.first},
        )

    def _why_nothing(self, untrained: bool) -> str:
        if not untrained:
            return self._bad.first[0] if self._bad.first else ""
        if self._fitting.too_long:
            return "The prompts alone fill max_seq_length, or no row has an assistant turn."
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
            eos_added_rows=rendering.eos_added_rows + encoding.eos_appended,
            tokenizer_adds_bos=self._tokenizer.adds_bos,
            double_bos_rows=encoding.double_bos_rows,
            special_in_text=dict((rendering.special_in_text + encoding.special_in_text).most_common()),
            rows_with_special=rendering.rows_with_special + encoding.rows_with_special,
            duplicate_rows=0,
            unused_columns=rendering.unused_columns,
            length_percentiles=percentiles_of(fitting.length_counts),
            histogram=histogram_of(fitting.length_counts),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        shapes = self._renderer.counts.shapes
        notes = []
        if len(shapes) > 1:
            notes.append(
                f"the rows have {len(shapes)} shapes: " + ", ".join(f"{s} {n}" for s, n in shapes.most_common())
            )
        if "alpaca" in shapes and self._tokenizer.template is None:
            notes.append(
                "the tokenizer has no chat template; rows of the shape alpaca use the built-in template alpaca"
            )
        if self._renderer.counts.eos_added_rows:
            notes.append("the template ends some assistant turn without an end token; the eos was put there")
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


def _duplicates(store: TokenStore) -> int:
    """Rows whose text occurred before. Pieces of one split row are not duplicates of each other."""
    first = np.concatenate([[True], np.diff(store.row_numbers) != 0])
    digests = store.digests[first]
    return len(digests) - len(np.unique(digests))


def _leaked(train: TokenStore, validation: TokenStore) -> int:
    return int(np.isin(np.unique(validation.digests), train.digests).sum())


def _packing_efficiency(store: TokenStore, config: DataConfig) -> float | None:
    if not config.packing:
        return None
    lengths = store.lengths
    packs = pack(lengths, config.max_seq_length, np.arange(len(lengths)))
    return float(lengths.sum()) / (len(packs) * config.max_seq_length)
