"""AdamW over the adapter tensors and the clip before it, as in `torch.optim.AdamW` and `clip_grad_norm_`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import EXACT, Arithmetic
from .arrays import Bool, Float64
from .lora import other_of_pair

STACK_AXES = 3
"""Of an adapter tensor of a stack of experts, `[experts, ...]`."""

_CLIP_EPSILON = 1e-6


@dataclass(slots=True)
class AdamWState:
    """`step` counts applied updates; first and second moments by tensor name."""

    step: int = 0
    exp_avg: dict[str, Float64] = field(default_factory=dict)
    exp_avg_sq: dict[str, Float64] = field(default_factory=dict)


def global_norm(gradients: Mapping[str, Float64]) -> float:
    """Euclidean norm of all gradients as one vector."""
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))


def clip_factor(norm: float, max_norm: float | None) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch clips; 1 when `max_norm` is None."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + _CLIP_EPSILON))


def adamw_update(
    parameters: dict[str, Float64],
    gradients: Mapping[str, Float64],
    state: AdamWState,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    arithmetic: Arithmetic = EXACT,
) -> None:
    """One step in place (arXiv:1711.05101, algorithm 2):

    p <- p (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    The decay is decoupled (not part of g), eps is outside the root, t counts from 1. An expert without tokens, of which
    A and B have no gradient at all, keeps p, m and v as they are.
    """
    beta1, beta2 = betas
    state.step += 1
    correction1 = 1.0 - beta1**state.step
    correction2 = 1.0 - beta2**state.step
    idle = idle_experts(gradients)
    for name, gradient in gradients.items():
        zeros = np.zeros_like(gradient)
        old_first, old_second = state.exp_avg.get(name, zeros), state.exp_avg_sq.get(name, zeros)
        first = beta1 * old_first + (1.0 - beta1) * gradient
        second = beta2 * old_second + (1.0 - beta2) * gradient**2
        direction = (first / correction1) / (np.sqrt(second / correction2) + eps)
        updated = parameters[name] * (1.0 - learning_rate * weight_decay) - learning_rate * direction
        still = idle.get(name, np.False_)
        parameters[name] = np.where(still, parameters[name], arithmetic.store_wide(updated))
        state.exp_avg[name] = np.where(still, old_first, arithmetic.store_wide(first))
        state.exp_avg_sq[name] = np.where(still, old_second, arithmetic.store_wide(second))


def idle_experts(gradients: Mapping[str, Float64]) -> dict[str, Bool]:
    """`[experts, 1, 1]` by tensor name, for the stacks among them: whether all numbers of this expert's A and of its B
    are zero. That is the mark of an expert to which the window sent no token that counts."""
    still: dict[str, Bool] = {
        name: np.asarray(~gradient.any(axis=(-2, -1), keepdims=True))
        for name, gradient in gradients.items()
        if gradient.ndim == STACK_AXES
    }
    return {name: mask & still[other_of_pair(name)] for name, mask in still.items()}
