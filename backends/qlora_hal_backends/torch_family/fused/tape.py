"""What one forward pass leaves for its backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from qlora_hal_backends.torch_family.fused.attention import Mixed, Samples
from qlora_hal_backends.torch_family.fused.layer_weights import LayerWeights
from qlora_hal_backends.torch_family.fused.operations import Rotary


class Keep(Enum):
    """What a layer keeps for backward; the rest is computed again there."""

    PRODUCTS = "products"
    ALL_BUT_GATE_UP = "all_but_gate_up"  # the two largest products: 2F of 2F + 2D + 2 (h + kv) d columns
    RESIDUAL = "residual"  # gradient checkpointing of whole layers (Chen et al. 2016)


@dataclass(frozen=True, slots=True)
class Sequences:
    """What all layers need to know of a batch: M rows, in which its samples lie end to end."""

    rows: int
    rotary: Mapping[str, Rotary]  # "" where all layers have the same
    samples: Samples

    def rotary_of(self, layer: LayerWeights) -> Rotary:
        return self.rotary.get(layer.rotary) or self.rotary[""]


@dataclass(slots=True)
class AttentionTape:
    h1: Tensor  # [M, D]
    input_low_rank: Tensor | None
    projected: Tensor  # [M, (h + 2 kv) d]; queries and keys before norm and rotation where heads are normed
    mixed: Mixed  # [M, h d], and what attention keeps
    branch: Tensor | None  # [M, D] before a norm that it is joined with
    output_low_rank: Tensor | None


@dataclass(slots=True)
class FeedForwardTape:
    h2: Tensor  # [M, D]
    input_low_rank: Tensor | None
    gate_up: Tensor | None  # [M, 2F]; None: computed again from h2
    output_low_rank: Tensor | None


@dataclass(slots=True)
class LayerTape:
    """What backward needs. Both parts None: computed again from `h1`."""

    h1: Tensor
    attention: AttentionTape | None
    feed_forward: FeedForwardTape | None
    output: Tensor | None = None  # [M, D], of the feed-forward before a norm that it is joined with


@dataclass(slots=True)
class StreamGradient:
    """Gradient of the residual stream: `exact` `[M, D]` in the residual's dtype, and the same in the compute dtype in
    the first D columns of `extended`, whose last columns the consuming group fills."""

    exact: Tensor
    extended: Tensor
