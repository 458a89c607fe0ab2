"""Rows of the lengths that rows of real data have, in batches: packed, or one sample a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal.data.tokens.packing import pack

MEDIAN, MEAN = 270, 385
PAD_MULTIPLE = 8

Sample = np.ndarray[Any, np.dtype[np.int32]]


def sample_lengths(count: int, longest: int) -> np.ndarray[Any, Any]:
    spread = np.sqrt(2 * np.log(MEAN / MEDIAN))
    drawn = np.random.default_rng(99).lognormal(np.log(MEDIAN), spread, count)
    return np.clip(drawn.round(), 8, longest).astype(np.int64)


def drawn_samples(rows: Sequence[Sequence[int]], vocabulary: int, seed: int) -> list[list[Sample]]:
    """Random tokens for `rows`, which holds the lengths of the samples of each row."""
    random = np.random.default_rng(seed)
    return [[random.integers(10, vocabulary, length).astype(np.int32) for length in lengths] for lengths in rows]


def batch_of(rows: Sequence[Sequence[Sample]], pad_multiple: int = PAD_MULTIPLE) -> Batch:
    """`rows` holds the samples of each row. Every token but the first of a sample is a label."""
    longest = max(sum(map(len, samples)) for samples in rows)
    width = -(-longest // pad_multiple) * pad_multiple
    ids, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    labels = np.full((len(rows), width), IGNORE_LABEL, np.int32)
    for row, samples in enumerate(rows):
        at = 0
        for number, sample in enumerate(samples, 1):
            part = slice(at, at + len(sample))
            ids[row, part] = sample
            labels[row, at + 1 : at + len(sample)] = sample[1:]
            positions[row, part] = np.arange(len(sample))
            segments[row, part] = number
            at += len(sample)
    return Batch(ids, labels, positions, segments)


def packed_rows(lengths: np.ndarray[Any, Any], capacity: int, per_batch: int) -> list[list[list[int]]]:
    random = np.random.default_rng(7)
    packs = pack(lengths, capacity, random.permutation(len(lengths)))
    rows = [[int(lengths[sample]) for sample in packs[place]] for place in random.permutation(len(packs))]
    return [rows[start : start + per_batch] for start in range(0, len(rows) - per_batch + 1, per_batch)]


def padded_rows(lengths: np.ndarray[Any, Any], per_batch: int) -> list[list[list[int]]]:
    rows = [[int(length)] for length in lengths]
    return [rows[start : start + per_batch] for start in range(0, len(rows) - per_batch + 1, per_batch)]
