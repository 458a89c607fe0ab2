"""One optimizer step in three rooms: the gradient of a window, the clip, the AdamW update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_hal.contract.values import Batch, StepSettings
from qlora_hal_oracle import Arithmetic, DropoutMasks, OracleLlama
from qlora_hal_oracle.adamw import AdamWState, adamw_update, clip_factor
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.loss import token_loss_gradient, token_loss_sum, token_losses

MasksOf = Callable[[Batch], DropoutMasks]


@dataclass(frozen=True, slots=True, eq=False)
class WindowResult:
    """Loss sum of a window, and the gradient of weighted loss sum / divisor by adapter tensor."""

    loss_sum: float
    gradients: dict[str, Float64]
    weighted_loss_sum: float | None = None


def window_gradient(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    """Sums over the micro-batches; a micro-batch without a counted token is passed over."""
    losses: list[float] = []
    weighted: list[float] = []
    total = {name: 0.0 * tensor for name, tensor in model.adapter.items()}
    for batch in window:
        if batch.counted_tokens == 0:
            continue
        forward = model.forward(batch, arithmetic, masks_of(batch))
        losses.append(token_loss_sum(forward.logits, batch.labels, arithmetic))
        weighted.append(weighted_sum(forward.logits, batch, losses[-1]))
        grad_logits = arithmetic.store(token_loss_gradient(forward.logits, batch.labels, divisor, batch.weights))
        for name, gradient in model.backward(forward, grad_logits, arithmetic).items():
            total[name] = arithmetic.store_wide(total[name] + gradient)
    has_weights = any(batch.weights is not None for batch in window)
    return WindowResult(math.fsum(losses), total, math.fsum(weighted) if has_weights else None)


def weighted_sum(logits: Float64, batch: Batch, loss_sum: float) -> float:
    """The sum of weight * loss, which is `loss_sum` without weights."""
    if batch.weights is None:
        return loss_sum
    return float((token_losses(logits, batch.labels) * batch.weights).sum())


def clip(gradients: dict[str, Float64], norm: float, max_norm: float | None) -> dict[str, Float64]:
    """Scaled down by the global norm of all adapter tensors."""
    factor = clip_factor(norm, max_norm)
    return {name: gradient * factor for name, gradient in gradients.items()}


def update(
    parameters: dict[str, Float64],
    gradients: dict[str, Float64],
    state: AdamWState,
    settings: StepSettings,
    arithmetic: Arithmetic,
) -> None:
    """AdamW in place, parameters and moments kept in float32."""
    adamw_update(
        parameters,
        gradients,
        state,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        arithmetic=arithmetic,
    )
