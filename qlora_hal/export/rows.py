"""The rows that adapter model and merged model are compared on."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.contract.values import Batch
from qlora_hal.data import evaluation_batches, prepare
from qlora_hal.data.source.in_memory import GivenRows
from qlora_hal.data.source.reading import blamed_on
from qlora_hal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qlora_hal.config.schema import DataConfig
    from qlora_hal.data import ChatTokenizer, TokenStore
    from qlora_hal.data.tokens.token_rows import Int64
    from qlora_hal.export.request import MergeRequest
    from qlora_hal.export.subject import Subject
    from qlora_hal.model.facts import ModelFacts

MAX_POSITIONS = 4096
"""Scored tokens at most: the reference keeps 4 bytes for each of them and each word of the vocabulary."""
_LOGITS_BYTES = 256 * 2**20
"""What one batch of logits may take on the host."""
TAIL_NOTE = "the run held no rows out; the two models are compared on the last rows it trained on"
NO_OTHERS_NOTE = (
    "every row is compared, so none is left to calibrate on: the KL of the requantized model is measured on the rows "
    "it was calibrated on, and looks smaller than it is; more rows or a lower --row-limit leave some"
)


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Rows and where they come from. `kind` is `validation`, `named` or `training tail`.

    `others` are rows of the run, or of the file named, that are not compared; it may be empty.
    """

    store: TokenStore
    kind: str
    name: str
    pad_id: int
    others: TokenStore
    note: str = ""

    @property
    def calibration(self) -> TokenStore:
        """What a quantizer sees. Rows it is not judged on, where there are any."""
        return self.others if len(self.others) else self.store

    @property
    def positions(self) -> int:
        """Scored tokens that are compared."""
        return min(self.store.counted_tokens, MAX_POSITIONS)

    def batches(self, vocabulary_size: int, batch_rows: int) -> Iterator[Batch]:
        """Every row once, in batches whose logits stay small on the host."""
        longest = int(self.store.lengths.max()) + 8
        fitting = max(1, _LOGITS_BYTES // (4 * longest * max(vocabulary_size, 1)))
        return evaluation_batches(self.store, min(batch_rows, fitting), pad_id=self.pad_id)

    def as_json(self) -> Mapping[str, object]:
        digest = hashlib.sha256(np.ascontiguousarray(self.store.digests).tobytes()).hexdigest()
        return {
            "kind": self.kind,
            "name": self.name,
            "rows": len(self.store),
            "scored_tokens": self.positions,
            "row_numbers": sorted({int(number) for number in self.store.row_numbers}),
            "sha256": digest,
        }


def held_out_rows(request: MergeRequest, subject: Subject, tokenizer: ChatTokenizer, facts: ModelFacts) -> HeldOutRows:
    """The rows named; else the run's validation rows; else the end of its training rows, with a note.

    Raises ConfigError QH-C64 when there are none, or the run's own cannot be read any more.
    """
    if request.rows is not None:
        data = subject.config.data.model_copy(
            update={"path": request.rows, "sources": (), "validation_path": None, "validation_fraction": 0.0}
        )
        with tempfile.TemporaryDirectory() as folder, blamed_on("--rows"):
            store, _ = _prepared(data, tokenizer, Path(folder), subject, facts, GivenRows())
            first = _scored(store)[: request.row_limit]
            return _rows(store, first, "named", Path(request.rows).name, tokenizer)
    if subject.run_dir is None:
        raise _no_rows(f"{subject.adapter_dir} is not in a run, so no rows are known")
    store, validation = _rows_of_run(subject, tokenizer, facts)
    name = subject.run_dir.resolve().name
    if validation is not None and len(validation):
        first = _scored(validation)[: request.row_limit]
        return replace(_rows(validation, first, "validation", name, tokenizer), others=store)
    last = _scored(store)[-request.row_limit :]
    return replace(_rows(store, last, "training tail", name, tokenizer), note=TAIL_NOTE)


def _rows_of_run(subject: Subject, tokenizer: ChatTokenizer, facts: ModelFacts) -> tuple[TokenStore, TokenStore | None]:
    assert subject.run_dir is not None
    cache = subject.run_dir / "tokens"
    try:
        if cache.is_dir():
            return _prepared(subject.config.data, tokenizer, cache, subject, facts, GivenRows.kept(subject.run_dir))
        with tempfile.TemporaryDirectory() as folder:
            rows = GivenRows.kept(subject.run_dir)
            return _prepared(subject.config.data, tokenizer, Path(folder), subject, facts, rows)
    except (DataError, OSError) as error:
        raise _no_rows(f"the run's own rows can no longer be read ({error})") from error


def _prepared(
    data: DataConfig,
    tokenizer: ChatTokenizer,
    cache_dir: Path,
    subject: Subject,
    facts: ModelFacts,
    rows: GivenRows,
) -> tuple[TokenStore, TokenStore | None]:
    prepared = prepare(
        data,
        tokenizer,
        cache_dir=cache_dir,
        seed=subject.seed,
        rows=rows.train,
        validation_rows=rows.validation,
        model_max_length=facts.max_position_embeddings,
        model_vocabulary_size=facts.vocabulary_size or None,
    )
    return prepared.train, prepared.validation


def _scored(store: TokenStore) -> Int64:
    return np.flatnonzero(store.counted > 0)


def _rows(store: TokenStore, compared: Int64, kind: str, name: str, tokenizer: ChatTokenizer) -> HeldOutRows:
    if not len(compared):
        raise _no_rows("none of the rows has a scored token")
    others = np.delete(np.arange(len(store)), compared)
    return HeldOutRows(store.subset(compared), kind, name, tokenizer.pad_id, store.subset(others))


def _no_rows(why: str) -> ConfigError:
    return ConfigError(
        "QH-C64",
        f"There are no rows to compare adapter and merged model on: {why}.",
        where="rows",
        cause="A merged model is kept only after it has been compared with the adapter.",
        fix="Give some with --rows FILE.jsonl (in any format that train reads).",
    )
