"""The operations of the fused step in plain torch, written for reading."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.operations import HeadNorm, Masks, Placements, Rotary
from qlora_hal_backends.torch_family.lora_linear import kept_inputs

GELU_SCALE, GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715
"""Of the approximation by tanh (Hendrycks and Gimpel 2016)."""


class ReferenceOperations:
    """See `operations.Operations`."""

    def __init__(self, activation: Activation = Activation.SILU) -> None:
        self.activation = activation

    def dequantize(self, base: BaseWeight, out: Tensor) -> None:
        out.copy_(base.dense())

    def place(self, source: Tensor, target: Tensor, placements: Placements) -> None:
        for start, place, rows, columns, stride in placements.entries:
            matrix = target.as_strided((rows, columns), (stride, 1), place)
            if start < 0:
                matrix.zero_()
            else:
                matrix.copy_(source[start : start + rows * columns].view(rows, columns))

    def copy_rows(self, source: Tensor, out: Tensor) -> None:
        out.copy_(source)

    def add_norm(
        self,
        residual: Tensor,
        pending: Tensor | None,
        weight: Tensor,
        epsilon: float,
        out: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        h = residual if pending is None else (residual.float() + pending.float()).to(residual.dtype)
        if pending is not None and into is not None:
            h = into.copy_(h)
        out.copy_(_normed(h.float(), epsilon) * weight.float())
        return h

    def norm_backward(
        self,
        gradient: Tensor,
        h: Tensor,
        weight: Tensor,
        epsilon: float,
        residual_gradient: Tensor | None,
        out: Tensor,
        out_exact: Tensor | None,
        normed: Tensor | None,
    ) -> None:
        exact = _norm_gradient(gradient.float(), h.float(), weight.float(), epsilon)
        if residual_gradient is not None:
            exact += residual_gradient
        if normed is not None:
            normed.copy_(_normed(h.float(), epsilon) * weight.float())
        if out_exact is not None:
            out_exact.copy_(exact)
        out.copy_(exact)

    def swiglu(self, gate_up: Tensor, out: Tensor) -> None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        out.copy_(self._activated(gate)[0] * up)

    def swiglu_backward(self, gate_up: Tensor, gradient: Tensor, out: Tensor, product: Tensor) -> None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        upstream = gradient.float()
        activated, slope = self._activated(gate)
        found, again = torch.cat((upstream * up * slope, upstream * activated), dim=-1), activated * up
        out.copy_(found)
        product.copy_(again)

    def _activated(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The activation and its derivative."""
        if self.activation is Activation.SILU:
            sigmoid = torch.sigmoid(gate)
            return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid)
        inner = GELU_SCALE * (gate + GELU_CUBE * gate**3)
        tanh = torch.tanh(inner)
        slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh**2) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * gate**2)
        return 0.5 * gate * (1.0 + tanh), slope

    def rotate(self, source: Tensor, out: Tensor, heads: HeadCounts, rotary: Rotary, norm: HeadNorm | None) -> None:
        columns = heads.query_columns + heads.key_columns
        x = source[:, :columns].float().unflatten(-1, (-1, heads.size))
        if norm is not None:
            query, key = norm.weights.float()
            weights = torch.cat((query.expand(heads.query, -1), key.expand(heads.key_value, -1)))
            x = _normed(x, norm.epsilon) * weights
        out[:, :columns].copy_(_rotated(x, rotary, 1.0).flatten(1))

    def rotate_backward(
        self,
        gradient: Tensor,
        out: Tensor,
        rotary: Rotary,
        norm: HeadNorm | None,
        source: Tensor,
        is_key: bool,
    ) -> None:
        upstream = gradient.float().transpose(1, 2).flatten(0, 1)
        unrotated = _rotated(upstream, rotary, -1.0)
        if norm is not None:
            x = source.float().unflatten(-1, (-1, gradient.shape[-1]))
            unrotated = _norm_gradient(unrotated, x, norm.weights[int(is_key)].float(), norm.epsilon)
        out.copy_(unrotated.flatten(1))

    def drop(self, x: Tensor, masks: Masks, number: int, out: Tensor) -> None:
        out.copy_(x * kept_inputs(masks.dropout.tokens, masks.channels[number], masks.dropout.rate))

    def add_dropped(self, product: Tensor, v: Tensor, a: Tensor, masks: Masks, out: Tensor) -> None:
        exact = product.clone()
        for number, channels in enumerate(masks.channels):
            rank = slice(number * masks.rank, (number + 1) * masks.rank)
            kept = kept_inputs(masks.dropout.tokens, channels, masks.dropout.rate)
            exact += (v[:, rank].float() @ a[rank].float()) * kept
        out.copy_(exact)

    def cross_entropy(self, logits: Tensor, targets: Tensor, scale: float, with_gradient: bool) -> Tensor:
        exact = logits.float()
        normalizer = torch.logsumexp(exact, dim=-1, keepdim=True)
        losses = (normalizer - exact.gather(1, targets[:, None]))[:, 0]
        if with_gradient:
            gradient = torch.exp(exact - normalizer)
            gradient.scatter_add_(1, targets[:, None], torch.full_like(losses, -1.0)[:, None])
            logits.copy_(gradient * scale)
        return losses


def _normed(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    inverse_rms = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
    normed, weighted = x * inverse_rms, gradient * weight
    return inverse_rms * (weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True))


def _rotated(x: Tensor, rotary: Rotary, direction: float) -> Tensor:
    """Rotate pairs (i, i + n) of `[M, heads, d]` by the row's n angles; direction -1 is the transpose. What lies behind
    them does not turn."""
    cos = rotary.cos[rotary.positions][:, None]
    sin = rotary.sin[rotary.positions][:, None] * direction
    first, second, rest = x.tensor_split((rotary.pairs, 2 * rotary.pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
