"""Rotary positions that mlx-lm computes otherwise than transformers, put right on the instances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.positional_encoding import RoPE

from qlora_hal.model.facts import text_config
from qlora_hal_backends.mlx_lora.config_reading import Config


class LongRoPE(Module):
    """LongRoPE (Ding et al. 2024) as transformers has it: a row of up to `original_length` tokens takes the short
    factors, a longer one the long factors, both scaled by one attention factor. mlx-lm 0.32 always takes the long."""

    def __init__(self, dims: int, base: float, rope: Mapping[str, Any], original_length: int, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # None of these is a parameter: nothing is stored for them.
        self._dims = dims
        self._original_length = original_length
        self._short = _frequencies(dims, base, rope["short_factor"])
        self._long = _frequencies(dims, base, rope["long_factor"])
        self._scale = _attention_factor(rope, original_length, length)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """`x` `[batch, heads, time, head_dim]`."""
        frequencies = self._long if x.shape[-2] + offset > self._original_length else self._short
        if self._scale != 1.0:
            x = mx.concatenate([x[..., : self._dims] * self._scale, x[..., self._dims :]], axis=-1)
        rotated: mx.array = mx.fast.rope(
            x, self._dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=frequencies
        )
        return rotated


def _frequencies(dims: int, base: float, factors: float | Sequence[float]) -> mx.array:
    return mx.array(factors, dtype=mx.float32) * base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)


def _attention_factor(rope: Mapping[str, Any], original_length: int, length: int) -> float:
    given, factor = rope.get("attention_factor"), rope.get("factor") or length / original_length
    if given is not None:
        return float(given)
    return 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original_length))


def put_rotary_positions_right(causal: Any, read: Config) -> None:
    """`read`: config.json as transformers reads it."""
    config = text_config(read)
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    if rope.get("rope_type") == "longrope":
        _take_short_factors(causal, rope, config)
    # mlx-lm's first GLM rotates whole heads; a part of each is what the checkpoints were trained with.
    if read.get("model_type") == "glm":
        for layer in causal.layers:
            attention = layer.self_attn
            attention.rope = RoPE(
                int(attention.head_dim * rope.get("partial_rotary_factor", 1.0)), True, rope["rope_theta"]
            )  # type: ignore[no-untyped-call]


def _take_short_factors(causal: Any, rope: Mapping[str, Any], config: Config) -> None:
    from mlx_lm.models.rope_utils import SuScaledRoPE

    length, original = config["max_position_embeddings"], rope["original_max_position_embeddings"]
    for module in causal.modules():
        for name, child in module.children().items():
            if isinstance(child, SuScaledRoPE):
                setattr(module, name, LongRoPE(child.dim, rope["rope_theta"], rope, original, length))
