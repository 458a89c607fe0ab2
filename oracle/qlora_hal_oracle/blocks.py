"""The parts of a Llama layer that have no trained adapter: each as a forward function and its hand-written gradient.

A backward function takes the gradient of its output first and returns the gradients of its inputs in their order.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import Arithmetic
from .arrays import Bool, Float64, Int32


def rms_norm(x: Float64, weight: Float64, eps: float) -> Float64:
    """y = w x r with r = (mean(x^2) + eps)^(-1/2) over the last axis (arXiv:1910.07467)."""
    root: Float64 = np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return weight * x / root


def rms_norm_backward(grad: Float64, x: Float64, weight: Float64, eps: float) -> tuple[Float64, Float64]:
    """dx = r (w g) - x r^3 mean(w g x); dw = sum over tokens of g x r. The second term of dx is dr/dx = -r^3 x / n."""
    r = 1.0 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    weighted = weight * grad
    grad_x = r * weighted - x * r**3 * (weighted * x).mean(axis=-1, keepdims=True)
    grad_weight = (grad * x * r).reshape(-1, x.shape[-1]).sum(axis=0)
    return grad_x, grad_weight


def rotary_angles(position_ids: Int32, head_dim: int, theta: float) -> tuple[Float64, Float64]:
    """(cos, sin), `[batch, 1, time, head_dim]`: angle j of position p is p theta^(-2j/head_dim) (arXiv:2104.09864).

    Both halves of the head carry the same angles, as in Hugging Face: dimension j is paired with j + head_dim/2.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = position_ids.astype(np.float64)[:, None, :, None] * frequencies
    both_halves = np.concatenate([angles, angles], axis=-1)
    return np.cos(both_halves), np.sin(both_halves)


def rotate(x: Float64, cos: Float64, sin: Float64) -> Float64:
    """Turn each pair by its angle: x cos + (-x2, x1) sin."""
    return x * cos + _quarter_turn(x) * sin


def rotate_backward(grad: Float64, cos: Float64, sin: Float64) -> Float64:
    """The transpose of a rotation is the rotation back."""
    return grad * cos - _quarter_turn(grad) * sin


def _quarter_turn(x: Float64) -> Float64:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


def attention_allowed(segment_ids: Int32) -> Bool:
    """`[batch, 1, time, time]`: query t may see key s when s <= t and both are of one segment.

    Padding is a segment of its own (0). It sees padding, so no row of the softmax is empty and none gives NaN, and no
    real token sees it.
    """
    time = segment_ids.shape[1]
    same_segment: Bool = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    allowed: Bool = same_segment & np.tril(np.ones((time, time), dtype=np.bool_))
    return allowed


def attention(
    query: Float64, key: Float64, value: Float64, allowed: Bool, arithmetic: Arithmetic, name: str
) -> tuple[Float64, Float64]:
    """(softmax(q k^T / sqrt(d)) v, the softmax), all `[batch, heads, time, d]`; keys already repeated to the heads."""
    scale = query.shape[-1] ** -0.5
    scores = arithmetic.product(f"{name}.scores", query, np.swapaxes(key, -1, -2)) * scale
    shifted = np.where(allowed, scores, -np.inf)
    exponentials = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    weights = arithmetic.store(exponentials / exponentials.sum(axis=-1, keepdims=True))
    return arithmetic.store(arithmetic.product(f"{name}.mix", weights, value)), weights


def attention_backward(
    grad: Float64, query: Float64, key: Float64, value: Float64, weights: Float64, arithmetic: Arithmetic, name: str
) -> tuple[Float64, Float64, Float64]:
    """With P the softmax and S the scores: dV = P^T g, dP = g V^T, dS = P (dP - sum(dP P)), dQ = dS K, dK = dS^T Q.

    Forbidden places have P = 0, so dS is 0 there without a second mask.
    """
    scale = query.shape[-1] ** -0.5
    grad_value = arithmetic.product(f"{name}.grad_value", np.swapaxes(weights, -1, -2), grad)
    grad_weights = arithmetic.product(f"{name}.grad_weights", grad, np.swapaxes(value, -1, -2))
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(axis=-1, keepdims=True)) * scale
    grad_scores = arithmetic.store(grad_scores)
    grad_query = arithmetic.product(f"{name}.grad_query", grad_scores, key)
    grad_key = arithmetic.product(f"{name}.grad_key", np.swapaxes(grad_scores, -1, -2), query)
    return arithmetic.store(grad_query), arithmetic.store(grad_key), arithmetic.store(grad_value)


def split_heads(x: Float64, heads: int) -> Float64:
    """`[batch, time, heads * d]` to `[batch, heads, time, d]`."""
    batch, time, width = x.shape
    return x.reshape(batch, time, heads, width // heads).transpose(0, 2, 1, 3)


def join_heads(x: Float64) -> Float64:
    """Inverse of `split_heads`."""
    batch, heads, time, depth = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, time, heads * depth)


def repeat_keys(x: Float64, times: int) -> Float64:
    """Give each key head to `times` neighbouring query heads (grouped-query attention, arXiv:2305.13245)."""
    return np.repeat(x, times, axis=1)


def repeat_keys_backward(grad: Float64, times: int) -> Float64:
    """What was copied collects the gradients of its copies."""
    batch, heads, time, depth = grad.shape
    collected: Float64 = grad.reshape(batch, heads // times, times, time, depth).sum(axis=2)
    return collected


def gated_silu(gate: Float64, up: Float64) -> Float64:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)) (SwiGLU, arXiv:2002.05202)."""
    return gate * _sigmoid(gate) * up


def gated_silu_backward(grad: Float64, gate: Float64, up: Float64) -> tuple[Float64, Float64]:
    """silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = _sigmoid(gate)
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s


def _sigmoid(x: Float64) -> Float64:
    # tanh does not overflow where exp(-x) would.
    return 0.5 * (1.0 + np.tanh(0.5 * x))
