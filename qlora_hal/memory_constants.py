"""What the memory estimate must know of a backend's code, as data; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryConstants:
    """What depends on the backend's code and not on the model.

    `hidden_copies` and `feed_forward_copies` count the tensors of those widths that one decoder layer keeps for its
    backward pass, per token, in the compute dtype. The defaults are those of unfused modules: two norm inputs kept in
    float32 (4), two norm outputs, the query and the attention output (4); gate, its SiLU, up and their product (4).
    `cross_entropy_rows` is the chunk of a chunked cross-entropy, None when all logits exist at once.
    """

    runtime_bytes: int = 600_000_000
    workspace_bytes: int = 128 * 2**20
    hidden_copies: float = 8.0
    feed_forward_copies: float = 4.0
    dequantized_copies: int = 1
    cross_entropy_rows: int | None = None
    attention_scores_kept: bool = False
    master_bytes: int = 4
    gradient_bytes: int = 4
    relative_error: float = 0.15


FUSED_KERNELS = MemoryConstants(hidden_copies=6.0, feed_forward_copies=3.0, cross_entropy_rows=256)
"""Fused norm and SwiGLU kernels that keep only their inputs, and a cross-entropy in chunks of 256 tokens."""
