"""The adapter model's logits on the held-out rows, kept on disk, and how far another model's are from them.

Divergence of the candidate q from the adapter model p, per scored token, in nats and in float64 (Kullback and Leibler
1951): sum over the vocabulary of p (ln p - ln q). Only logits enter that score a label, those the training loss sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import IGNORE_LABEL, Batch, Float32
from qlora_hal.errors import NumericsError

Float64 = npt.NDArray[np.float64]
Batches = Callable[[], Iterable[Batch]]
Logits = Callable[[Batch], Float32]

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Closeness:
    """A candidate beside the adapter model. `kl_mean` and `kl_max` in nats per token; `top1` the share of tokens on
    which both put the same word first; `loss` the candidate's own mean loss on the labels, in nats."""

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    loss: float
    largest_logit_difference: float

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Spread:
    """What the adapter model's own logits say of their sensitivity: `deviation` is the root mean square of their
    standard deviation over the vocabulary, `margins` `[tokens]` the lead of the first word over the second."""

    loss: float
    deviation: float
    margins: Float64


class Reference:
    """Logits of the adapter model `[tokens, vocabulary]` float32 in a file of their own, removed when closed."""

    def __init__(self, path: Path, positions: int, batches: Batches) -> None:
        self._path = path
        self._positions = positions
        self._batches = batches
        self._stored: Float32 | None = None
        self._labels = np.empty(positions, np.int64)
        self.spread = Spread(float("nan"), float("nan"), np.empty(0))

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stored = None
        self._path.unlink(missing_ok=True)

    def record(self, logits: Logits) -> None:
        """Take the adapter model's logits. Raises NumericsError QH-C80 when they are not finite, OSError."""
        loss_sum = variance_sum = 0.0
        margins = []
        for part, found, labels in self._scored(logits):
            if not np.isfinite(found).all():
                raise NumericsError(
                    "QH-C80",
                    "The adapter model gives logits that are not finite; there is nothing to compare a merge with.",
                    fix="Merge an earlier checkpoint of the run.",
                )
            if self._stored is None:
                shape = (self._positions, found.shape[1])
                self._stored = np.memmap(self._path, mode="w+", dtype=np.float32, shape=shape)
            self._stored[part] = found
            self._labels[part] = labels
            wide = found.astype(np.float64)
            loss_sum -= float(_log_softmax(wide)[np.arange(len(labels)), labels].sum())
            variance_sum += float(wide.var(axis=1).sum())
            first_two = np.partition(wide, -2, axis=1)[:, -2:]
            margins.append(first_two[:, 1] - first_two[:, 0])
        count = self._positions
        self.spread = Spread(loss_sum / count, (variance_sum / count) ** 0.5, np.concatenate(margins))

    def closeness(self, logits: Logits) -> Closeness:
        """How far a candidate is. Logits that are not finite give a divergence that is not either."""
        assert self._stored is not None, "the reference is recorded first"
        divergences, agreed, loss_sum, difference = [], 0, 0.0, 0.0
        for part, found, labels in self._scored(logits):
            expected, candidate = self._stored[part].astype(np.float64), found.astype(np.float64)
            log_p, log_q = _log_softmax(expected), _log_softmax(candidate)
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            agreed += int((expected.argmax(axis=1) == candidate.argmax(axis=1)).sum())
            loss_sum -= float(log_q[np.arange(len(labels)), labels].sum())
            difference = max(difference, float(np.abs(expected - candidate).max()))
        every = np.concatenate(divergences)
        count = len(every)
        # A divergence is never below 0; float64 rounding alone can put an exact 0 there.
        mean, largest = max(float(every.mean()), 0.0), max(float(every.max()), 0.0)
        return Closeness(count, mean, largest, agreed / count, loss_sum / count, difference)

    def _scored(self, logits: Logits) -> Iterator[tuple[slice, Float32, npt.NDArray[np.int64]]]:
        """(place, logits `[n, vocabulary]`, labels `[n]`) of the scored tokens, some at a time, in a fixed order."""
        done = 0
        for batch in self._batches():
            if done == self._positions:
                return
            found = logits(batch)
            rows, times = np.nonzero(batch.labels[:, 1:] != IGNORE_LABEL)
            left = self._positions - done
            rows, times = rows[:left], times[:left]
            size = max(1, _BLOCK_BYTES // (8 * found.shape[2]))
            for start in range(0, len(rows), size):
                some = slice(start, start + size)
                labels = batch.labels[rows[some], times[some] + 1].astype(np.int64)
                part = slice(done, done + len(labels))
                yield part, found[rows[some], times[some]], labels
                done = part.stop


def _log_softmax(logits: Float64) -> Float64:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
