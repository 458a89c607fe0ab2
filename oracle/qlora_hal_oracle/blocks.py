"""The parts of a decoder layer that have no trained adapter: each as a forward function and its hand-written gradient.

A backward function takes the gradient of its output first and returns the gradients of its inputs in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def rotary_angles(position_ids: Int32, frequencies: Float64, magnitude: float = 1.0) -> tuple[Float64, Float64]:
    """(cos, sin), `[batch, 1, time, 2 * pairs]`, times `magnitude`: angle j of position p is p times frequency j.

    Both halves carry the same angles, as in Hugging Face: dimension j is paired with j + pairs.
    """
    angles = position_ids.astype(np.float64)[:, None, :, None] * frequencies
    both_halves = np.concatenate([angles, angles], axis=-1)
    return magnitude * np.cos(both_halves), magnitude * np.sin(both_halves)


def rotary_frequencies(size: int, theta: float) -> Float64:
    """theta^(-2j/size) for each of the size/2 pairs j (arXiv:2104.09864)."""
    frequencies: Float64 = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    return frequencies


def rotate(x: Float64, cos: Float64, sin: Float64) -> Float64:
    """Turn each pair by its angle: x cos + (-x2, x1) sin. What a head has beyond the width of the angles stays."""
    turned, rest = np.split(x, [cos.shape[-1]], axis=-1)
    return np.concatenate([turned * cos + _quarter_turn(turned) * sin, rest], axis=-1)


def rotate_backward(grad: Float64, cos: Float64, sin: Float64) -> Float64:
    """The transpose of a rotation is the rotation back."""
    return rotate(grad, cos, -sin)


def _quarter_turn(x: Float64) -> Float64:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


def attention_allowed(segment_ids: Int32, window: int = 0) -> Bool:
    """`[batch, 1, time, time]`: query t may see key s when s <= t and both are of one segment; with a window also only
    when t - s < window.

    Padding is a segment of its own (0). It sees padding, so no row of the softmax is empty and none gives NaN, and no
    real token sees it.
    """
    time = segment_ids.shape[1]
    same_segment: Bool = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    seen = np.tril(np.ones((time, time), dtype=np.bool_))
    if window:
        seen &= ~np.tri(time, k=-window, dtype=np.bool_)
    allowed: Bool = same_segment & seen
    return allowed


def soft_cap(x: Float64, cap: float | None) -> Float64:
    """cap tanh(x / cap); x where there is no cap."""
    return x if cap is None else cap * np.tanh(x / cap)


def soft_cap_slope(capped: Float64, cap: float | None) -> Float64 | float:
    """The derivative of `soft_cap`, from what it gave: 1 - (y / cap)^2."""
    return 1.0 if cap is None else 1.0 - (capped / cap) ** 2


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTrace:
    """The softmax `[batch, heads, time, time]`, and the slope of the scores by q k^T."""

    weights: Float64
    slope: Float64 | float


def attention(
    query: Float64,
    key: Float64,
    value: Float64,
    allowed: Bool,
    arithmetic: Arithmetic,
    name: str,
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float64 | None = None,
) -> tuple[Float64, AttentionTrace]:
    """(softmax(soft_cap(scale q k^T)) v, trace), all `[batch, heads, time, d]`; keys already repeated to the heads. The
    softmax is also over `sinks` `[heads]`, where there are, of which no value follows."""
    products = arithmetic.product(f"{name}.scores", query, np.swapaxes(key, -1, -2))
    scores = soft_cap(products * scale, cap)
    shifted = np.where(allowed, scores, -np.inf)
    largest = shifted.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None, None])
    exponentials = np.exp(shifted - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - largest)
    weights = arithmetic.store(exponentials / total)
    mixed = arithmetic.store(arithmetic.product(f"{name}.mix", weights, value))
    return mixed, AttentionTrace(weights, scale * soft_cap_slope(scores, cap))


def attention_backward(
    grad: Float64,
    query: Float64,
    key: Float64,
    value: Float64,
    trace: AttentionTrace,
    arithmetic: Arithmetic,
    name: str,
) -> tuple[Float64, Float64, Float64]:
    """With P the softmax and S = q k^T: dV = P^T g, dP = g V^T, dS = slope P (dP - sum(dP P)), dQ = dS K, dK = dS^T Q.

    Forbidden places have P = 0, so dS is 0 there without a second mask.
    """
    weights = trace.weights
    grad_value = arithmetic.product(f"{name}.grad_value", np.swapaxes(weights, -1, -2), grad)
    grad_weights = arithmetic.product(f"{name}.grad_weights", grad, np.swapaxes(value, -1, -2))
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(axis=-1, keepdims=True)) * trace.slope
    grad_scores = arithmetic.store(grad_scores)
    grad_query = arithmetic.product(f"{name}.grad_query", grad_scores, key)
    grad_key = arithmetic.product(f"{name}.grad_key", np.swapaxes(grad_scores, -1, -2), query)
    return arithmetic.store(grad_query), arithmetic.store(grad_key), arithmetic.store(grad_value)


def sinks_backward(grad: Float64, value: Float64, trace: AttentionTrace) -> Float64:
    """`[heads]`: with p = 1 - sum(P) the sink's share, dp of which is 0: -p sum(dP P), over all queries."""
    along = (trace.weights * (grad @ np.swapaxes(value, -1, -2))).sum(axis=-1)
    shares = 1.0 - trace.weights.sum(axis=-1)
    total: Float64 = -(shares * along).sum(axis=(0, 2))
    return total


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


def gated(gate: Float64, up: Float64, activation: str = "silu") -> Float64:
    """activation(gate) * up (arXiv:2002.05202)."""
    return ACTIVATIONS[activation](gate)[0] * up


def gated_backward(grad: Float64, gate: Float64, up: Float64, activation: str = "silu") -> tuple[Float64, Float64]:
    """(gradient of the gate, of up)."""
    value, slope = ACTIVATIONS[activation](gate)
    return grad * up * slope, grad * value


GPT_OSS_SLOPE = 1.702
"""gpt-oss's `swiglu_alpha`: x sigmoid(1.702 x) is near GELU (arXiv:1606.08415)."""


def limited_gated(gate: Float64, up: Float64, limit: float) -> Float64:
    """gpt-oss: (u + 1) g sigmoid(1.702 g), with g the gate up to the limit and u within plus and minus the limit."""
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    product: Float64 = (u + 1.0) * g * _sigmoid(GPT_OSS_SLOPE * g)
    return product


def limited_gated_backward(grad: Float64, gate: Float64, up: Float64, limit: float) -> tuple[Float64, Float64]:
    """(gradient of the gate, of up): zero beyond the limit."""
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    s = _sigmoid(GPT_OSS_SLOPE * g)
    slope = s * (1.0 + GPT_OSS_SLOPE * g * (1.0 - s))
    return grad * (u + 1.0) * slope * (gate <= limit), grad * g * s * (np.abs(up) <= limit)


def _sigmoid(x: Float64) -> Float64:
    # tanh does not overflow where exp(-x) would.
    s: Float64 = 0.5 * (1.0 + np.tanh(0.5 * x))
    return s


def _silu(x: Float64) -> tuple[Float64, Float64]:
    """x s with s = sigmoid(x), and s (1 + x (1 - s))."""
    s = _sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


def _gelu(x: Float64) -> tuple[Float64, Float64]:
    """x F(x) with F the normal distribution, and F + x F' (arXiv:1606.08415)."""
    below = 0.5 * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), dtype=np.float64))
    return x * below, below + x * np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def _gelu_tanh(x: Float64) -> tuple[Float64, Float64]:
    """The same with F(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    root = math.sqrt(2.0 / math.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2) * root * (1.0 + 3.0 * 0.044715 * x**2)
    return 0.5 * x * (1.0 + t), slope


def _relu(x: Float64) -> tuple[Float64, Float64]:
    return np.maximum(x, 0.0), (x > 0.0).astype(np.float64)


_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy has none

ACTIVATIONS: Mapping[str, Callable[[Float64], tuple[Float64, Float64]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": _relu,
}
"""Hugging Face's name -> (value, slope)."""
