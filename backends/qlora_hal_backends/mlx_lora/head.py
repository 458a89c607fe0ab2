"""The output head, apart from the body where that is possible: logits are then made for counted tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qlora_hal.errors import ModelError


@dataclass(frozen=True, slots=True)
class Head:
    """`body` gives hidden states `[batch, time, hidden]`, `project` turns rows of them into logits."""

    body: Any
    weight: Any
    tied: bool

    def logits(self, hidden: mx.array) -> mx.array:
        """Float32 logits of `[..., hidden]`."""
        raw = self.weight.as_linear(hidden) if self.tied else self.weight(hidden)
        logits: mx.array = raw.astype(mx.float32)
        return logits


_TRIAL_TOKENS = (0, 1, 2)


_FAILURES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)


def find_head(causal: Any, architecture: str) -> Head | None:
    """The head of a model whose logits are a plain product with its last hidden states, None for any other (capped or
    scaled logits). Found by trying: the model's own logits of three tokens must be these, bit for bit. Raises
    ModelError QH-M51 for a model that cannot compute them."""
    tokens = mx.array([_TRIAL_TOKENS])
    try:
        expected = causal(tokens).astype(mx.float32)
    except _FAILURES as error:
        raise ModelError(
            "QH-M51",
            f"mlx-lm's model of {architecture} fails on three tokens.",
            cause=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="Choose another backend for this model, or update mlx-lm.",
        ) from error
    body = getattr(causal, "model", None)
    own = getattr(causal, "lm_head", None)
    embedding = getattr(body, "embed_tokens", None)
    if body is None or (own is None and embedding is None):
        return None
    head = Head(body, own if own is not None else embedding, own is None)
    try:
        found = head.logits(body(tokens))
    except _FAILURES:
        return None
    same = found.shape == expected.shape and bool(mx.array_equal(found, expected, equal_nan=True))
    return head if same else None
