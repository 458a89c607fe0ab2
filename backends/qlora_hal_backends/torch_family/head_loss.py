"""Output head and cross-entropy in one function, over the counted tokens only and in chunks.

The head is frozen, so its input's gradient can be computed while the logits are at hand; the logits of a whole batch
(two gigabytes for 4 x 2048 tokens of a 128k vocabulary in bfloat16) never stand in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.platform import LOSS_CHUNK_ROWS

CHUNK_ROWS = LOSS_CHUNK_ROWS


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap * tanh((h W^T + bias) * multiplier / cap), without the cap where `softcap` is None (Gemma 2)."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None = None
    softcap: float | None = None
    multiplier: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of `[rows, hidden]`."""
        raw = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
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
    result: Tensor = _HeadLoss.apply(hidden, targets, head, gradient_scale, weights)  # type: ignore[no-untyped-call]
    return result


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, gradient_scale: float, weights: Tensor | None
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        total = torch.zeros(() if weights is None else 2, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, hidden.shape[0], LOSS_CHUNK_ROWS):
            rows = slice(start, start + LOSS_CHUNK_ROWS)
            logits = head.logits(hidden[rows])
            log_normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
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
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.reshape(-1)[-1].to(gradient.dtype), None, None, None, None


def _hidden_gradient(
    logits: Tensor, log_normalizer: Tensor, target: Tensor, head: Head, scale: float | Tensor
) -> Tensor:
    slope = None if head.softcap is None else 1.0 - (logits / head.softcap) ** 2  # derivative of cap * tanh(z / cap)
    gradient = torch.exp_(logits.sub_(log_normalizer))  # softmax; the logits are not needed again
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    gradient.mul_(scale * head.multiplier)
    if slope is not None:
        gradient.mul_(slope)
    return gradient.to(head.weight.dtype) @ head.weight


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
    for start in range(0, hidden.shape[0], LOSS_CHUNK_ROWS):
        rows = slice(start, start + LOSS_CHUNK_ROWS)
        found[rows] = torch.nn.functional.cross_entropy(head.logits(hidden[rows]), targets[rows], reduction="none")
    return found
