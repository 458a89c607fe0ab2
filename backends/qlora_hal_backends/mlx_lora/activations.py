"""Activations that mlx-lm computes otherwise than transformers, put right on the instance."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import gelu_approx
from mlx.nn.layers.base import Module

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource

_SILU = ("silu", "swish", None)
_ALWAYS_SILU = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Model types that mlx-lm 0.32 computes with SiLU whatever config.json says."""


class TanhGeluMLP(Module):
    """down(gelu(gate(x)) * up(x)) with the tanh form of GELU (Hendrycks & Gimpel 2016), as Gemma was trained.

    mlx-lm 0.32 takes the exact form for the first Gemma: logits differ by 2e-4 of the largest.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = self.down_proj(gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return product


def put_activations_right(causal: Any, source: ModelSource) -> None:
    """Raises ModelError QH-M51 for an activation that mlx-lm would silently take for another."""
    asked = text_config(source.facts.config).get("hidden_act")
    if source.facts.model_type in _ALWAYS_SILU and asked not in _SILU:
        raise ModelError(
            "QH-M51",
            f"mlx-lm cannot build {source.facts.architecture} with the activation {asked}: it always takes silu.",
            where=source.name,
            fix="Choose another backend for this model.",
        )
    if source.facts.model_type == "gemma":
        for layer in causal.layers:
            layer.mlp = TanhGeluMLP(layer.mlp)
