"""Next-token cross-entropy as a sum over counted tokens, and its gradient."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .arithmetic import Arithmetic
from .arrays import IGNORE_LABEL, AnyFloat, Bool, Float64, Int32, TokenBatch


def counted_labels(labels: Int32) -> tuple[Int32, Bool]:
    """(label, counts) for the logits of each position but the last: the logits at t are scored against labels[t + 1].

    Only the labels decide what counts. Where samples are packed, the first token of each must carry `IGNORE_LABEL`,
    or the last token of the sample before would be asked to predict it.
    """
    targets = labels[:, 1:]
    return targets, targets != IGNORE_LABEL


def count_tokens(batches: Iterable[TokenBatch]) -> int:
    """Number of tokens that carry loss."""
    return sum(int(np.count_nonzero(counted_labels(batch.labels)[1])) for batch in batches)


def token_loss_sum(logits: Float64, labels: Int32, arithmetic: Arithmetic) -> float:
    """Sum of -log softmax(logits[t])[labels[t + 1]] over counted positions."""
    targets, counts = counted_labels(labels)
    log_probabilities = _log_softmax(logits[:, :-1])
    chosen = np.take_along_axis(log_probabilities, np.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    return float(arithmetic.store_wide(-chosen[counts]).sum())


def token_losses(logits: Float64, labels: Int32) -> Float64:
    """-log softmax(logits[t - 1])[labels[t]] at each counted t `[batch, time]`, 0 elsewhere."""
    targets, counts = counted_labels(labels)
    chosen = np.take_along_axis(_log_softmax(logits[:, :-1]), np.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    losses = np.zeros(labels.shape)
    losses[:, 1:] = np.where(counts, -chosen, 0.0)
    return losses


def token_loss_gradient(logits: Float64, labels: Int32, normalizer: float, weights: AnyFloat | None = None) -> Float64:
    """Gradient of loss_sum / normalizer by the logits: weight * (softmax - one_hot) / normalizer where one counts."""
    targets, counts = counted_labels(labels)
    gradient = np.zeros_like(logits)
    probabilities = np.exp(_log_softmax(logits[:, :-1]))
    rows, times = np.nonzero(counts)
    probabilities[rows, times, targets[rows, times]] -= 1.0
    if weights is not None:
        probabilities *= weights[:, 1:, None]
    gradient[:, :-1] = np.where(counts[..., None], probabilities / normalizer, 0.0)
    return gradient


def _log_softmax(logits: Float64) -> Float64:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities
