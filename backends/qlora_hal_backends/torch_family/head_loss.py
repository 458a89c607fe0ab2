"""Output head and cross-entropy in one function, over the counted tokens only and in chunks.

The head is frozen, so its input's gradient can be computed while the logits are at hand; the logits of a whole batch
(two gigabytes for 4 x 2048 tokens of a 128k vocabulary in bfloat16) never stand in memory.

A head that comes in pieces of its vocabulary is read twice: for the normalizers, and for the gradient, with its logits
made again (Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.host_tables import StreamedMatrix
from qlora_hal_backends.torch_family.lora_linear import product_in_float32
from qlora_hal_backends.torch_family.platform import LOSS_CHUNK_LOGITS, LOSS_CHUNK_ROWS

CHUNK_ROWS = LOSS_CHUNK_ROWS
_FEW_ROWS = 128
"""Chunks are multiples of it, of what is large in every direction of a product."""


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap * tanh((h W^T + bias) * multiplier / cap), without the cap where `softcap` is None (Gemma 2)."""

    weight: Tensor | StreamedMatrix  # [vocabulary, hidden]
    bias: Tensor | None = None
    softcap: float | None = None
    multiplier: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of `[rows, hidden]`."""
        found = [self.logits_of(hidden, *piece) for piece in self.pieces()]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as it comes: which part of the vocabulary, and its rows, until the next piece is asked for."""
        if isinstance(self.weight, StreamedMatrix):
            return self.weight.pieces()
        return iter([(slice(0, self.weight.shape[0]), self.weight)])

    def logits_of(self, hidden: Tensor, vocabulary: slice, weight: Tensor) -> Tensor:
        """Float32 logits of a piece."""
        bias = None if self.bias is None else self.bias[vocabulary]
        raw = torch.nn.functional.linear(hidden, weight, bias).float()
        if self.multiplier != 1.0:
            raw = raw * self.multiplier
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap


def loss_sum(
    hidden: Tensor, targets: Tensor, head: Head, gradient_scale: float, weights: Tensor | None = None
) -> Tensor:
    """Sum of token losses in nats, a float32 scalar; with `weights` `[rows]`, that and the weighted sum, `[2]`, whose
    last is differentiated.

    Its backward gives the gradient of `gradient_scale` times that sum: the scale (1 / denominator, times the loss scale
    of float16) enters in float32, before anything is rounded.
    """
    function = _StreamedHeadLoss if isinstance(head.weight, StreamedMatrix) else _HeadLoss
    result: Tensor = function.apply(hidden, targets, head, gradient_scale, weights)  # type: ignore[no-untyped-call]
    return result


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, gradient_scale: float, weights: Tensor | None
    ) -> Tensor:
        assert isinstance(head.weight, Tensor)
        wants_gradient = ctx.needs_input_grad[0]
        total = torch.zeros(() if weights is None else 2, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for rows in _row_chunks(hidden, head.weight.shape[0]):
            logits = head.logits(hidden[rows])
            log_normalizer = _log_normalizer(logits)
            target = targets[rows, None]
            losses = log_normalizer - logits.gather(1, target)
            scale: float | Tensor = gradient_scale
            if weights is None:
                total += losses.sum()
            else:
                weight = weights[rows, None]
                total += torch.stack((losses.sum(), (losses * weight).sum()))
                scale = gradient_scale * weight
            if gradient is not None:
                gradient[rows] = _hidden_gradient(logits, log_normalizer, target, head, scale)
            del logits  # or two chunks of them stood at a time
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.reshape(-1)[-1].to(gradient.dtype), None, None, None, None


class _StreamedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, gradient_scale: float, weights: Tensor | None
    ) -> Tensor:
        log_normalizer, losses = _streamed_losses(hidden, targets, head)
        total = losses.sum() if weights is None else torch.stack((losses.sum(), (losses * weights).sum()))
        scale = gradient_scale if weights is None else gradient_scale * weights[:, None]
        gradient = _streamed_gradient(hidden, targets, head, log_normalizer, scale) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.reshape(-1)[-1].to(gradient.dtype), None, None, None, None


def _streamed_losses(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Log normalizers `[rows, 1]` and losses `[rows]`, float32."""
    log_normalizer = hidden.new_full((hidden.shape[0], 1), -torch.inf, dtype=torch.float32)
    at_target = torch.zeros_like(log_normalizer)
    for vocabulary, weight in head.pieces():
        for rows in _row_chunks(hidden, len(weight)):
            logits = head.logits_of(hidden[rows], vocabulary, weight)
            inside, place = _within(targets[rows, None], vocabulary)
            at_target[rows] += logits.gather(1, place) * inside
            log_normalizer[rows] = torch.logaddexp(log_normalizer[rows], _log_normalizer(logits))
    return log_normalizer, (log_normalizer - at_target)[:, 0]


def _streamed_gradient(
    hidden: Tensor, targets: Tensor, head: Head, log_normalizer: Tensor, scale: float | Tensor
) -> Tensor:
    """Summed over the pieces in float32, rounded once."""
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    for vocabulary, weight in head.pieces():
        for rows in _row_chunks(hidden, len(weight)):
            logits = head.logits_of(hidden[rows], vocabulary, weight)
            inside, place = _within(targets[rows, None], vocabulary)
            of_rows = scale if not isinstance(scale, Tensor) else scale[rows]
            slopes = _logit_gradient(logits, log_normalizer[rows], place, inside, head, of_rows)
            gradient[rows] += product_in_float32(slopes.to(weight.dtype), weight)
    return gradient.to(hidden.dtype)


def _row_chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    few = LOSS_CHUNK_LOGITS // vocabulary // _FEW_ROWS * _FEW_ROWS
    size = min(LOSS_CHUNK_ROWS, max(few, _FEW_ROWS))
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _log_normalizer(logits: Tensor) -> Tensor:
    """`[rows, 1]`, a few rows at a time: torch makes as many numbers again on the way as there are logits."""
    return torch.cat([torch.logsumexp(few, dim=-1, keepdim=True) for few in logits.split(_FEW_ROWS)])


def _within(target: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Whether a target is in this piece, as 1 or 0, and where; somewhere in it if not."""
    inside = (target >= vocabulary.start) & (target < vocabulary.stop)
    return inside.float(), (target - vocabulary.start).clamp(0, vocabulary.stop - vocabulary.start - 1)


def _hidden_gradient(
    logits: Tensor, log_normalizer: Tensor, target: Tensor, head: Head, scale: float | Tensor
) -> Tensor:
    assert isinstance(head.weight, Tensor)
    inside = torch.ones_like(target, dtype=logits.dtype)
    slopes = _logit_gradient(logits, log_normalizer, target, inside, head, scale)
    return slopes.to(head.weight.dtype) @ head.weight


def _logit_gradient(
    logits: Tensor, log_normalizer: Tensor, target: Tensor, inside: Tensor, head: Head, scale: float | Tensor
) -> Tensor:
    """In place of the logits: the gradient of `scale` times the losses, before the head's cap and multiplier."""
    slope = None if head.softcap is None else 1.0 - (logits / head.softcap) ** 2  # derivative of cap * tanh(z / cap)
    gradient = torch.exp_(logits.sub_(log_normalizer))  # softmax; the logits are not needed again
    gradient.scatter_add_(1, target, -inside)
    gradient.mul_(scale * head.multiplier)
    if slope is not None:
        gradient.mul_(slope)
    return gradient


def whole_loss_sum(
    logits: Tensor, counted: Tensor, targets: Tensor, gradient_scale: float, weights: Tensor | None = None
) -> Tensor:
    """`loss_sum` where only the architecture itself can make logits: `[batch, time, vocabulary]` of them, whole."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[counted], targets, reduction="none")
    total = losses.sum() if weights is None else torch.stack((losses.sum(), (losses * weights).sum()))
    # The value is the sum, the gradient that of the scaled sum.
    return total.detach() + gradient_scale * (total - total.detach())


def row_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The loss of each row `[rows]` in nats, float32."""
    found = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for rows in _row_chunks(hidden, head.weight.shape[0]):
        found[rows] = torch.nn.functional.cross_entropy(head.logits(hidden[rows]), targets[rows], reduction="none")
    return found
