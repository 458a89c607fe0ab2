"""An embedding whose outputs mlx-lm multiplies by a rounded number."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

_ROUNDED_ROOT = frozenset({"gemma3", "gemma3_text"})
"""Model types whose embeddings mlx-lm 0.32 multiplies by the root of the hidden size in bfloat16. transformers rounds
it to the dtype that is computed in, so in float32 they are up to 2^-9 apart."""


class RescaledEmbedding(Module):
    """`embedding`, its outputs (not its transposed product) times `ratio`."""

    def __init__(self, embedding: Any, ratio: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._embedding = embedding
        self._ratio = ratio

    def __call__(self, tokens: mx.array) -> mx.array:
        outputs: mx.array = self._embedding(tokens) * self._ratio
        return outputs

    def as_linear(self, hidden: mx.array) -> mx.array:
        product: mx.array = self._embedding.as_linear(hidden)
        return product


def put_embedding_right(causal: Any, model_type: str, hidden_size: int, dtype: Any) -> None:
    """For a model whose weights are in their places."""
    if model_type not in _ROUNDED_ROOT or dtype != mx.float32:
        return
    body = getattr(causal, "language_model", causal).model
    root = hidden_size**0.5
    ratio = root / mx.array(root, mx.bfloat16).astype(mx.float32).item()
    if ratio != 1.0:
        body.embed_tokens = RescaledEmbedding(body.embed_tokens, ratio)
