"""The head loss of `torch_family.head_loss` with one kernel for loss and gradient, in place on the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family import head_loss as plain
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.head_loss import CHUNK_ROWS, Head


def loss_sum_with(
    operations: Operations,
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    gradient_scale: float,
    weights: Tensor | None = None,
) -> Tensor:
    """`head_loss.loss_sum`, computed with `operations`. Heads that reshape their logits or come in pieces, and weighted
    tokens, take the plain function."""
    reshaped = head.softcap is not None or head.multiplier != 1.0 or head.bias is not None
    if reshaped or weights is not None or not isinstance(head.weight, Tensor):
        return plain.loss_sum(hidden, targets, head, gradient_scale, weights)
    result: Tensor = _HeadLoss.apply(hidden, targets, head.weight, gradient_scale, operations)  # type: ignore[no-untyped-call]
    return result


def select_rows(states: Tensor, rows: Tensor) -> Tensor:
    """`states[rows]` for rows that are all different: the gradient is a copy, where indexing would sort and add."""
    selected: Tensor = _SelectRows.apply(states, rows)  # type: ignore[no-untyped-call]
    return selected


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, gradient_scale: float, operations: Operations
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = hidden[rows] @ weight.t()
            total += operations.cross_entropy(logits, targets[rows], gradient_scale, wants_gradient).sum()
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
            del logits
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = states.shape
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient), None
