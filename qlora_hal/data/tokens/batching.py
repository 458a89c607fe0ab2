"""From rows of a token store to padded micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal.data.tokens.store import TokenStore


def batch_of(store: TokenStore, sequences: Sequence[Sequence[int]], *, pad_id: int, pad_to_multiple: int) -> Batch:
    """A batch whose sequence i holds the rows `sequences[i]` one after the other, each as a segment of its own.

    Shape `[len(sequences), longest sequence rounded up to pad_to_multiple]`.
    """
    used = max(sum(int(store.lengths[row]) for row in rows) for rows in sequences)
    shape = (len(sequences), -(-used // pad_to_multiple) * pad_to_multiple)
    ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORE_LABEL, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.full(shape, PADDING_SEGMENT, np.int32)
    for line, rows in enumerate(sequences):
        at = 0
        for segment, row in enumerate(rows, start=1):
            tokens, trained = store.row(row)
            part = slice(at, at + len(tokens))
            ids[line, part] = tokens
            labels[line, part] = np.where(trained, tokens, IGNORE_LABEL)
            labels[line, at] = IGNORE_LABEL
            positions[line, part] = np.arange(len(tokens))
            segments[line, part] = segment
            at += len(tokens)
    return Batch(ids, labels, positions, segments)


def without_labels(batch: Batch) -> Batch:
    """The same tokens with nothing to learn; for a rank that has no share of a last, partial window."""
    return replace(batch, labels=np.full_like(batch.labels, IGNORE_LABEL))
