"""From a window of numpy batches to gradients: one traced function for each micro-batch, sums carried along.

Nothing here waits for the device. The function is traced once for each shape; numbers that change from step to step
are arrays, so they never cause a new trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from qlora_hal.contract import dropout
from qlora_hal.contract.toolkit import next_labels, next_weights
from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.mlx_lora.capabilities import LOSS_CHUNK_ROWS
from qlora_hal_backends.mlx_lora.loading import BaseModel
from qlora_hal_backends.mlx_lora.masks import MaskingCache, check_all_used
from qlora_hal_backends.mlx_lora.optimizer import queue

SMALLEST_COUNTED_SHARE = 8
"""Counted positions are padded to an eighth, a quarter, half or all of the batch: few shapes to trace."""

Tensors = dict[str, mx.array]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch on the device. `counted` indexes the flattened positions whose next token carries loss, padded; `counts`
    is 0 at the padding. `weights` are those of the loss, None where every token weighs 1."""

    input_ids: mx.array  # [batch, time]
    counted: mx.array  # [counted]
    targets: mx.array  # [counted]
    counts: mx.array  # [counted]
    weights: mx.array | None  # [counted]
    segments: mx.array | None  # [batch, time]; None where every row is one sample

    def arrays(self) -> tuple[mx.array | None, ...]:
        return self.input_ids, self.counted, self.targets, self.counts, self.weights, self.segments


def to_device(base: BaseModel, batch: Batch) -> DeviceBatch:
    """Which positions count is decided here, on the host, and whether the rows can be computed at all: raises
    UnsupportedFeatureError QH-B60 for packed samples that would see one another, QH-B61 for samples beyond a window
    that mlx-lm ignores, QH-B62 for samples that would get other rotary factors than alone."""
    if (limit := base.window.longest_sample) is not None:
        limit.check_batch(batch)
    if base.rotary is not None:
        base.rotary.check_batch(batch, batch.input_ids.shape[1])
    if batch.is_packed:
        check_can_share_rows(base)
    flat = next_labels(batch).reshape(-1)
    counted = np.flatnonzero(flat != IGNORE_LABEL)
    room = _padded(len(counted), flat.size)
    places, targets, counts = np.zeros(room, np.int32), np.zeros(room, np.int32), np.zeros(room, np.float32)
    places[: len(counted)], targets[: len(counted)], counts[: len(counted)] = counted, flat[counted], 1.0
    weights = None
    if batch.weights is not None:
        following = np.zeros(room, np.float32)
        following[: len(counted)] = next_weights(batch).reshape(-1)[counted]
        weights = mx.array(following)
    return DeviceBatch(
        mx.array(batch.input_ids),
        mx.array(places),
        mx.array(targets),
        mx.array(counts),
        weights,
        # Rows that are one sample padded on the right need no mask: causal attention never looks at what follows.
        mx.array(batch.segment_ids) if batch.is_packed else None,
    )


def _padded(count: int, size: int) -> int:
    room = -(-size // SMALLEST_COUNTED_SHARE)
    while room < count:
        room *= 2
    return room


def hidden_states(base: BaseModel, input_ids: mx.array, segments: mx.array | None, *, whole: bool) -> mx.array:
    """The body's last hidden states `[batch, time, hidden]`; with `whole`, the model's logits."""
    window = base.window.applied_to(input_ids.shape[1])
    forward = base.causal if whole or base.head is None else base.head.body
    if segments is None and window is None:
        states: mx.array = forward(input_ids)
        return states
    caches = [MaskingCache(segments, window) for _ in base.causal.layers]
    try:
        states = forward(input_ids, cache=caches)
    except (TypeError, AttributeError) as error:
        if segments is None:
            raise base.window.too_long(input_ids.shape[1]) from error
        raise UnsupportedFeatureError(
            "QH-B60",
            f"Packing is not possible with {base.architecture}: its layers keep another state than keys and values.",
            cause=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="Set data.packing false.",
        ) from error
    if segments is None and not all(cache.was_used for cache in caches):
        raise base.window.too_long(input_ids.shape[1])
    check_all_used(caches, base.architecture)
    return states


def check_can_share_rows(base: BaseModel) -> None:
    """Raises UnsupportedFeatureError QH-B60 where a sample of a packed row is not computed as it is alone."""
    if base.mixes_samples is None:
        base.mixes_samples = _why_samples_mix(base)
    if base.mixes_samples:
        raise UnsupportedFeatureError(
            "QH-B60",
            f"Packing is not possible with {base.architecture}: {base.mixes_samples}.",
            where="data.packing",
            cause="The samples of a row would change one another.",
            fix="Set data.packing false.",
        )


def _why_samples_mix(base: BaseModel) -> str:
    """Two samples in one row, and each alone, through the base. Positions of packed rows go on from sample to sample,
    which is the same where only the distance of two tokens counts: rotary positions that are normed after their
    rotation (Hunyuan), and learned ones, are not of that kind."""
    if "hunyuan" in base.architecture.lower():
        return "it norms queries and keys after their rotation"  # too little in 16 bits for a trial to show
    left, right = (1, 2, 3), (5, 8, 4)
    segments = mx.array([[1] * len(left) + [2] * len(right)])
    base.slots.enabled = False
    try:
        together = hidden_states(base, mx.array([[*left, *right]]), segments, whole=True)[0]
        alone = mx.concatenate([hidden_states(base, mx.array([one]), None, whole=True)[0] for one in (left, right)])
    except UnsupportedFeatureError as error:
        return error.cause or error.message.removesuffix(".")
    except Exception as error:  # what mlx-lm's models raise over rows that short
        return f"its forward pass fails on a short packed row ({type(error).__name__})"
    finally:
        base.slots.enabled = True
    # Sums in another order: 1e-4 of the largest in float32, else 8 units in the last place.
    units = {mx.bfloat16: 8 * 2**-7, mx.float16: 8 * 2**-10}
    bound = units.get(together.dtype, 1e-4)
    together, alone = together.astype(mx.float32), alone.astype(mx.float32)
    apart = float(np.array(mx.abs(together - alone).max() / mx.abs(alone).max()))
    return f"a sample gives other logits behind another one ({apart:.0e} of the largest)" if apart > bound else ""


def logits(base: BaseModel, batch: DeviceBatch) -> mx.array:
    """Float32 logits `[batch, time, vocabulary]`."""
    return hidden_states(base, batch.input_ids, batch.segments, whole=True).astype(mx.float32)


def token_losses(rows: mx.array, targets: mx.array, counts: mx.array) -> mx.array:
    """The loss of each row in nats, 0 where it does not count, for float32 logits `[rows, vocabulary]`."""
    picked = mx.take_along_axis(rows, targets[:, None], axis=-1)[:, 0]
    losses = mx.logsumexp(rows, axis=-1) - picked
    # `where`, not a product: a padding place may hold anything.
    return mx.where(counts > 0, losses, 0.0)


def _sums(losses: mx.array, weights: mx.array | None) -> tuple[mx.array, mx.array]:
    """(what is minimised, [sum of the losses, weighted sum])."""
    plain = losses.sum()
    minimised = plain if weights is None else (losses * weights).sum()
    return minimised, mx.stack([plain, minimised])


def loss_sum(base: BaseModel, batch: DeviceBatch, *, differentiated: bool) -> tuple[mx.array, mx.array]:
    """(what to differentiate, `[sum of token losses, weighted sum]`).

    The head is frozen, so the gradient of its input is computed while a chunk's logits are at hand, and its product
    with the hidden states is what is differentiated: the logits of a batch never stand whole in memory.
    """
    states = hidden_states(base, batch.input_ids, batch.segments, whole=False)
    rows = states.reshape(-1, states.shape[-1])[batch.counted]
    if base.head is None:
        return _sums(token_losses(rows.astype(mx.float32), batch.targets, batch.counts), batch.weights)
    total, followed = mx.zeros(2), mx.array(0.0)
    for start in range(0, rows.shape[0], LOSS_CHUNK_ROWS):
        chunk = slice(start, start + LOSS_CHUNK_ROWS)
        targets, counts, head = batch.targets[chunk], batch.counts[chunk], base.head
        weights = None if batch.weights is None else batch.weights[chunk]

        def chunk_loss(
            hidden: mx.array,
            targets: mx.array = targets,
            counts: mx.array = counts,
            weights: mx.array | None = weights,
            head: Any = head,
        ) -> tuple[mx.array, mx.array]:
            return _sums(token_losses(head.logits(hidden), targets, counts), weights)

        still = mx.stop_gradient(rows[chunk])
        if not differentiated:
            total = total + chunk_loss(still)[1]
            continue
        (_, sums), gradient = mx.value_and_grad(chunk_loss)(still)
        total = total + sums
        followed = followed + (rows[chunk].astype(mx.float32) * gradient.astype(mx.float32)).sum()
    return followed, total


class WindowGradient:
    """Traced functions over one attached adapter. `names` fixes the order of its tensors."""

    def __init__(self, base: BaseModel, names: Sequence[str], *, recompute: bool, compiled: Compile) -> None:
        self._base = base
        self._names = tuple(names)
        self._recompute = recompute
        self._accumulate = compiled(self._micro_batch)
        self._evaluate = compiled(self._micro_batch_loss)

    def of_window(
        self, tensors: Mapping[str, mx.array], window: Sequence[Batch], denominator: float, dropout_key: int | None
    ) -> tuple[list[mx.array], mx.array]:
        """(gradient of weighted loss sum / denominator for each tensor, [loss sum, weighted]), queued.

        Each micro-batch is handed to the device before the next is traced, so that the activations of two never need
        to stand side by side.
        """
        values = [tensors[name] for name in self._names]
        sums = [mx.zeros_like(value) for value in values]
        total = mx.zeros(2)
        share = mx.array(1.0 / denominator if denominator else 0.0, dtype=mx.float32)
        for batch in window:
            if batch.counted_tokens == 0:
                continue
            words = None if dropout_key is None else _token_words(dropout_key, batch)
            sums, total = self._accumulate(values, sums, total, share, words, *to_device(self._base, batch).arrays())
            queue(*sums, total)
        return sums, total

    def loss_of(self, tensors: Mapping[str, mx.array], batch: Batch) -> mx.array:
        """`[loss sum, weighted]` of one batch, without dropout."""
        values = [tensors[name] for name in self._names]
        loss: mx.array = self._evaluate(values, *to_device(self._base, batch).arrays())
        return loss

    def _micro_batch(
        self,
        values: list[mx.array],
        sums: list[mx.array],
        total: mx.array,
        share: mx.array,
        token_words: mx.array | None,
        *batch: mx.array,
    ) -> tuple[list[mx.array], mx.array]:
        def loss(values: list[mx.array]) -> tuple[mx.array, mx.array]:
            named = dict(zip(self._names, values, strict=True))
            with self._base.slots.holding(named, token_words=token_words, recompute=self._recompute):
                followed, found = loss_sum(self._base, DeviceBatch(*batch), differentiated=True)
            return followed * share, found

        (_, found), gradients = mx.value_and_grad(loss)(values)
        return [one + other for one, other in zip(sums, gradients, strict=True)], total + found

    def _micro_batch_loss(self, values: list[mx.array], *batch: mx.array) -> mx.array:
        with self._base.slots.holding(dict(zip(self._names, values, strict=True))):
            return loss_sum(self._base, DeviceBatch(*batch), differentiated=False)[1]


def _token_words(dropout_key: int, batch: Batch) -> mx.array:
    words = dropout.token_words(dropout_key, dropout.rows_of(batch), batch.input_ids.shape[1])
    return mx.array(words.reshape(-1))
