"""How a mixture of experts sends tokens to experts: scores, the choice with its rule for ties, weights, and gradients.

The expert with the higher score is chosen, of equal ones the one with the lower index; no expert is ever full. Which
experts are chosen has no gradient; the weights of those that are have one, by the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Bool, Float64, Int64
from .shape import MixtureShape

_SUM_EPSILON = 1e-20
"""What the sigmoid routers of DeepSeek and GLM add to a sum of scores before they divide by it."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where each token goes. `scores` and `deciding`, by which experts are ranked, are `[tokens, experts]`; `chosen`,
    indices of experts, and `weights` are `[tokens, experts per token]`, the best first. `margin` `[tokens]` is how far
    the scores that decide would have to move towards each other before the choice were another."""

    scores: Float64
    deciding: Float64
    chosen: Int64
    weights: Float64
    margin: Float64


def route(mixture: MixtureShape, logits: Float64, correction: Float64 | None) -> Routing:
    """From the router's logits `[tokens, experts]`; `correction` `[experts]` is added to the scores for the choice
    alone (arXiv:2412.19437, section 2.1.2)."""
    if mixture.scoring == "softmax":
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=-1, keepdims=True)
        # The softmax keeps the order, and distances of logits do not shrink where one expert has nearly all.
        deciding = logits
    else:
        scores = 0.5 * (1.0 + np.tanh(0.5 * logits))
        deciding = scores if correction is None else scores + correction
    allowed, margin_of_groups = _in_best_groups(mixture, deciding)
    chosen, margin = _best(np.where(allowed, deciding, -np.inf), mixture.experts_per_token)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if mixture.normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _epsilon(mixture))
    return Routing(scores, deciding, chosen, mixture.scaling * weights, np.minimum(margin, margin_of_groups))


def route_backward(mixture: MixtureShape, grad_weights: Float64, routing: Routing) -> Float64:
    """Gradient of the logits from that of the weights. Normalized weights w = s / S give ds = (dw - sum(dw w)) / S; the
    softmax dz = p (dp - sum(dp p)), the sigmoid dz = ds s (1 - s)."""
    grad_chosen = mixture.scaling * grad_weights
    if mixture.normalized:
        total = np.take_along_axis(routing.scores, routing.chosen, axis=-1).sum(axis=-1, keepdims=True)
        shares = routing.weights / mixture.scaling
        along = (grad_chosen * shares).sum(axis=-1, keepdims=True)
        grad_chosen = (grad_chosen - along) / (total + _epsilon(mixture))
    grad_scores = np.zeros_like(routing.scores)
    np.put_along_axis(grad_scores, routing.chosen, grad_chosen, axis=-1)
    scores = routing.scores
    if mixture.scoring == "softmax":
        grad: Float64 = scores * (grad_scores - (grad_scores * scores).sum(axis=-1, keepdims=True))
        return grad
    return grad_scores * scores * (1.0 - scores)


def _epsilon(mixture: MixtureShape) -> float:
    return 0.0 if mixture.scoring == "softmax" else _SUM_EPSILON


def _in_best_groups(mixture: MixtureShape, deciding: Float64) -> tuple[Bool, Float64]:
    """Which experts are in the groups whose two best have the highest sums, and the margin of that choice."""
    tokens, experts = deciding.shape
    if mixture.groups_chosen == mixture.groups:
        return np.ones((tokens, experts), dtype=np.bool_), np.full(tokens, np.inf)
    grouped = np.sort(deciding.reshape(tokens, mixture.groups, -1), axis=-1)
    chosen, margin = _best(grouped[..., -2:].sum(axis=-1), mixture.groups_chosen)
    allowed = np.zeros((tokens, mixture.groups), dtype=np.bool_)
    np.put_along_axis(allowed, chosen, True, axis=-1)
    return np.repeat(allowed, experts // mixture.groups, axis=-1), margin


def _best(values: Float64, number: int) -> tuple[Int64, Float64]:
    """The places of the highest values in each row, of equal ones the first, and how far the last of them is above the
    next; infinity where all are chosen."""
    order = np.argsort(-values, axis=-1, kind="stable")
    if number == values.shape[-1]:
        return order, np.full(len(values), np.inf)
    last, next_one = (np.take_along_axis(values, order[:, at : at + 1], axis=-1)[:, 0] for at in (number - 1, number))
    return order[:, :number], last - next_one
