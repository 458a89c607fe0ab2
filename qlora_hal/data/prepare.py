"""The whole way from what the user named to token stores and an account of them.

What was prepared once is found again by a fingerprint over the rows' bytes, the tokenizer and the settings that matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.data.report import DataReport, SourceReport, SourceShare
from qlora_hal.data.source.columns import with_columns
from qlora_hal.data.source.mixture import (
    ALL_ONCE,
    Share,
    beginning,
    one_after_another,
    refuse_same_rows,
    sequences_in_epoch,
    source_of_rows,
)
from qlora_hal.data.source.reading import blamed_on, has_splits, open_source
from qlora_hal.data.source.rows import Source, memory_source
from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.data.tokens.packing import packs_of
from qlora_hal.data.tokens.store import NotAStore, TokenStore, open_store
from qlora_hal.data.tokens.tokenizing import Preparation
from qlora_hal.errors import ConfigError, DataError
from qlora_hal.files.opening import refuse_link

if TYPE_CHECKING:
    from qlora_hal.config.schema import DataConfig
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer

_VERSION = 5


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows ready to be trained on. `fingerprint` changes when any token, mask or row could; it is of what they are made
    from, `hashes` (SHA-256 by part) of the tokens themselves. `shares` are the sources of the training rows."""

    train: TokenStore
    validation: TokenStore | None
    report: DataReport
    fingerprint: str
    shares: tuple[Share, ...] = ALL_ONCE

    @property
    def hashes(self) -> Mapping[str, str]:
        held = {} if self.validation is None else {"validation": self.validation.sha256}
        return {"train": self.train.sha256, **held}


def prepare(
    config: DataConfig,
    tokenizer: ChatTokenizer,
    *,
    cache_dir: Path,
    seed: int,
    rows: Sequence[Mapping[str, object]] | None = None,
    validation_rows: Sequence[Mapping[str, object]] | None = None,
    model_max_length: int | None = None,
    model_vocabulary_size: int | None = None,
) -> PreparedData:
    """Read, render, tokenise and account for the data of a run; `rows` take the place of `config.path`,
    `validation_rows` that of `config.validation_path`.

    Raises DataError (faults D01-D16 of the catalogue; QH-D65 for the same rows on both sides), HubError, StorageError
    (QH-S09, QH-S11, QH-S12), and ConfigError (QH-D54) when `max_seq_length` is above what the model was made for.
    """
    refuse_long_sequences(config, model_max_length)
    source = _training_source(config, rows)
    train, report, fingerprint = _tokenised(source, config, tokenizer, cache_dir, model_vocabulary_size)
    shares = _shares(config, report) if rows is None else ALL_ONCE
    validation, validation_report, parts = None, None, [fingerprint]
    if config.validation_path or validation_rows is not None:
        with blamed_on("data.validation_path", split="data.validation_split"):
            held = _validation_source(config, validation_rows)
            found = _tokenised(held, config, tokenizer, cache_dir, model_vocabulary_size)
        validation, validation_report, second = found
        if second == fingerprint:
            raise _trained_on_itself(source, held)
        parts.append(second)
    elif config.validation_fraction:
        train, validation = hold_out(train, config.validation_fraction, seed, shares)
        parts.append(f"{config.validation_fraction} {seed}")
    if config.sources and rows is None:
        parts.append(json.dumps([weight for _, weight in shares]))
    in_epoch = _in_epoch(train, shares, config, seed)
    whole = DataReport(
        report,
        validation_report,
        sources=_account_of_sources(in_epoch, report),
        train_sequences=len(train),
        validation_sequences=0 if validation is None else len(validation),
        leaked_rows=0 if validation is None else _leaked(train, validation),
        packing_efficiency=_packing_efficiency(in_epoch, config),
        notes=tokenizer.notes,
    )
    return PreparedData(train, validation, whole, hashlib.sha256("\n".join(parts).encode()).hexdigest(), shares)


def hold_out(
    store: TokenStore, fraction: float, seed: int, shares: Sequence[Share] = ALL_ONCE
) -> tuple[TokenStore, TokenStore]:
    """(training rows, validation rows). Rows with the same text, and pieces of one row, stay on one side; a source of
    which nothing would be left to train on is not held out.

    Raises DataError (QH-D01) when that leaves nothing to train on, or to judge by.
    """
    texts, group = np.unique(store.digests, return_inverse=True)
    sizes = np.bincount(group, minlength=len(texts))
    if len(texts) < 2:
        raise DataError(
            "QH-D01",
            f"All {len(store)} usable rows have the same text; none can be held out for validation.",
            where="data.validation_fraction",
            fix="Add more rows, or name a file in data.validation_path.",
        )
    # np.unique sorts by digest, which says nothing of the place in the file; the order is drawn over that.
    order = permutation(len(texts), seed, Purpose.HOLD_OUT)
    wanted = max(1, round(len(store) * fraction))
    count = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = np.zeros(len(texts), dtype=bool)
    chosen[order[: min(count, len(texts) - 1)]] = True
    source = source_of_rows(store.row_numbers, shares)
    for of_source in (group[source == number] for number in range(len(shares))):
        if chosen[of_source].all():
            chosen[of_source] = False
    held = chosen[group]
    if not held.any():
        raise DataError(
            "QH-D01",
            "No row can be held out for validation: each source would be left without one to train on.",
            where="data.validation_fraction",
            fix="Add more rows, or name a file in data.validation_path.",
        )
    return store.subset(np.flatnonzero(~held)), store.subset(np.flatnonzero(held))


def _training_source(config: DataConfig, rows: Sequence[Mapping[str, object]] | None) -> Source:
    """The training rows under the names of a format, no more of them than data.max_rows. Raises as `open_source`."""

    def opened(source: Source, columns: Mapping[str, str]) -> Source:
        read = source if config.max_rows is None else beginning(source, config.max_rows)
        return with_columns(read, columns or config.columns)

    if rows is not None:
        return opened(memory_source(rows), {})
    if not config.sources:
        return opened(open_source(config.path, config.split, config.max_rows), {})
    found = []
    for number, source in enumerate(config.sources):
        with blamed_on(f"data.sources[{number}].path", split=f"data.sources[{number}].split"):
            found.append(opened(open_source(source.path, source.split, config.max_rows), source.columns))
    refuse_same_rows(found, [(source.path, source.split) for source in config.sources])
    return one_after_another(found)


def _shares(config: DataConfig, report: SourceReport) -> tuple[Share, ...]:
    if not config.sources:
        return ALL_ONCE
    return tuple((first, source.weight) for first, source in zip(report.first_rows, config.sources, strict=True))


@dataclass(frozen=True, slots=True)
class _InEpoch:
    """How much of one source the store holds, in rows, tokens, and sequences (rows, or packs of them), and how many of
    these sequences an epoch has."""

    weight: float
    rows: int
    tokens: int
    trained_tokens: int
    sequences: int
    drawn: int

    @property
    def times(self) -> float:
        """How often an epoch has each row, on average."""
        return self.drawn / max(self.sequences, 1)


def _in_epoch(store: TokenStore, shares: Sequence[Share], config: DataConfig, seed: int) -> list[_InEpoch]:
    source, found = source_of_rows(store.row_numbers, shares), []
    for number, (_, weight) in enumerate(shares):
        rows = np.flatnonzero(source == number)
        sequences = len(rows)
        if config.packing:
            sequences = len(packs_of(rows, store.lengths, config.max_seq_length, seed=seed, shuffle=config.shuffle))
        tokens, trained = (int(counts[rows].sum(dtype=np.int64)) for counts in (store.lengths, store.counted))
        found.append(_InEpoch(weight, len(rows), tokens, trained, sequences, sequences_in_epoch(sequences, weight)))
    return found


def _account_of_sources(sources: Sequence[_InEpoch], report: SourceReport) -> list[SourceShare]:
    """What an epoch has of each of several sources. Raises DataError (QH-D01) for one that has nothing to train on."""
    names = report.parts
    if not names:
        return []
    empty = next((name for name, source in zip(names, sources, strict=True) if not source.rows), None)
    if empty is not None:
        raise DataError(
            "QH-D01",
            f"No row of {empty} is left to train on.",
            where="data.sources",
            fix="Remove it from data.sources, or correct its rows.",
        )
    trained = sum(source.trained_tokens * source.times for source in sources)
    return [
        SourceShare(
            name,
            source.weight,
            source.rows,
            round(source.rows * source.times),
            source.trained_tokens * source.times / trained,
            effective_weight=source.times,
        )
        for name, source in zip(names, sources, strict=True)
    ]


def _validation_source(config: DataConfig, rows: Sequence[Mapping[str, object]] | None) -> Source:
    """The validation rows: of what has splits, those of `validation` where no other is named.

    Raises as `open_source` does.
    """
    if rows is not None:
        return with_columns(memory_source(rows), config.columns)
    path, split = config.validation_path or "", config.validation_split
    if split is None or has_splits(path):
        return with_columns(open_source(path, split or "validation"), config.columns)
    raise DataError(
        "QH-D50",
        f"{path!r} has no splits, but the split {split!r} was given.",
        where="data.split",
        fix="Remove data.split, or name the file itself in data.path.",
    )


def _trained_on_itself(train: Source, validation: Source) -> DataError:
    return DataError(
        "QH-D65",
        f"The validation rows ({validation.name}) are the training rows ({train.name}).",
        where="data.validation_path",
        cause="A loss on rows that are trained on says nothing about other rows.",
        fix="Name other rows, another data.validation_split, or a data.validation_fraction instead.",
    )


def refuse_long_sequences(config: DataConfig, model_max_length: int | None) -> None:
    """Raises ConfigError QH-D54 where rows may be longer than the model has positions, if that number is known."""
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
    found, problem = _from_cache(path, fingerprint)
    if found is None:
        store, report = Preparation(source, config, tokenizer, vocabulary).run(path, fingerprint)
        if source.stamp() != stamp:
            path.unlink(missing_ok=True)
            raise DataError(
                "QH-D64",
                f"The data {source.name!r} changed while it was being read.",
                where="data.path",
                fix="Wait until the file is completely written, then start again.",
            )
        found = store, report
    store, report = found
    again = (
        [f"the tokens of {source.name} were prepared again: {path.name} cannot be used, {problem}"] if problem else []
    )
    alerts = [*source.alerts, *report.alerts, *again]
    report = replace(
        report, source=source.name, parts=list(source.parts), duplicate_rows=_duplicates(store), alerts=alerts
    )
    return store, report, fingerprint


def _fingerprint(source: Source, config: DataConfig, tokenizer: ChatTokenizer, vocabulary: int | None) -> str:
    settings = [config.format, config.train_on, config.max_seq_length, config.truncation, config.on_bad_row]
    settings += [config.mask_reasoning]
    parts = [_VERSION, source.digest(), source.kind, tokenizer.hash, tokenizer.template_name, vocabulary, *settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _from_cache(path: Path, fingerprint: str) -> tuple[tuple[TokenStore, SourceReport] | None, str]:
    """(what was prepared before, ""), or (None, why it does not serve; nothing where there is none)."""
    refuse_link(path.parent)
    try:
        store, metadata = open_store(path)
        if metadata.get("fingerprint") != fingerprint:
            return None, "it belongs to other rows or settings"
        return (store, SourceReport.from_json(json.loads(metadata["report"]))), ""
    except FileNotFoundError:
        return None, ""
    except OSError as problem:
        return None, f"it cannot be read ({problem.strerror or problem})"
    except NotAStore as problem:
        return None, str(problem)
    except (ValueError, KeyError, TypeError):
        return None, "its report cannot be read"


def _duplicates(store: TokenStore) -> int:
    """Rows whose text occurred before. Pieces of one split row are not duplicates of each other."""
    first = np.concatenate([[True], np.diff(store.row_numbers) != 0])
    digests = store.digests[first]
    return len(digests) - len(np.unique(digests))


def _leaked(train: TokenStore, validation: TokenStore) -> int:
    return int(np.isin(np.unique(validation.digests), train.digests).sum())


def _packing_efficiency(sources: Sequence[_InEpoch], config: DataConfig) -> float | None:
    if not config.packing:
        return None
    tokens = sum(source.tokens * source.times for source in sources)
    return tokens / (sum(source.drawn for source in sources) * config.max_seq_length)
