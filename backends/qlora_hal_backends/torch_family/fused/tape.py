"""What one forward pass leaves for its backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import Attended, Mixed, Samples
from qlora_hal_backends.torch_family.fused.layer_weights import LayerWeights
from qlora_hal_backends.torch_family.fused.mixture.operations import Routed
from qlora_hal_backends.torch_family.fused.operations import Dropout, Rotary


class Keep(Enum):
    """What a layer keeps for backward; the rest is computed again there."""

    PRODUCTS = "products"
    ALL_BUT_GATE_UP = "all_but_gate_up"  # the two largest products: 2F of 2F + 2D + 2 (h + kv) d columns
    RESIDUAL = "residual"  # gradient checkpointing of whole layers (Chen et al. 2016)
    RESIDUAL_AND_ATTENDED = "residual_and_attended"  # what attention gave, too: over long rows it is most of the work


@dataclass(frozen=True, slots=True)
class Sequences:
    """What all layers need to know of a batch: M rows, in which its samples lie end to end."""

    rows: int
    rotary: Mapping[str, Rotary]  # "" where all layers have the same
    samples: Samples
    dropout: Dropout | None

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
    products: FeedForwardProducts | None  # None: computed again from h2, some rows at a time


@dataclass(slots=True)
class FeedForwardProducts:
    """Of the rows of a tile, or of all. What is None is computed again where it is read."""

    input_low_rank: Tensor | None
    extended: Tensor  # [rows, 2F + R]: gate and up, and what backward makes of them in their place
    output_low_rank: Tensor | None
    output: Tensor | None  # [rows, D], before a norm that it is joined with
    routed: Routed | None = None  # of a mixture, whose rows are those of its experts, and without room for R
    shared: SharedProducts | None = None


@dataclass(slots=True)
class SharedProducts:
    """Of the expert that all tokens go to."""

    products: FeedForwardProducts
    gate: GateWeights | None


@dataclass(frozen=True, slots=True)
class GateWeights:
    """The weight of each token in the gated product, where a gate gives one."""

    weights: Tensor  # [M, 1]
    places: Tensor  # 0 to M


@dataclass(slots=True)
class LayerTape:
    """What backward needs. Both parts None: computed again from `h1`, and from what attention gave where that is kept;
    these may wait elsewhere until then."""

    h1: Tensor | None
    attention: AttentionTape | None
    feed_forward: FeedForwardTape | None
    attended: Attended | None = None

    def give(self) -> tuple[Tensor, ...]:
        """`h1` and what is large of `attended`, which this tape holds no longer."""
        assert self.h1 is not None, "a layer's input is given away once"
        given: tuple[Tensor, ...] = (self.h1,)
        self.h1 = None
        if self.attended is not None:
            given = (*given, *self.attended.large)
            self.attended = self.attended.without_large()
        return given

    def take(self, given: Sequence[Tensor]) -> None:
        """What was given, or a copy."""
        self.h1, *large = given
        if self.attended is not None:
            self.attended = self.attended.with_large(large)

    def taken(self) -> tuple[Tensor, Attended | None]:
        """`h1` and `attended`, which this tape holds no longer."""
        h1, attended = self.h1, self.attended
        assert h1 is not None, "a layer's input was taken back"
        self.h1 = self.attended = None
        return h1, attended


@dataclass(slots=True)
class StreamGradient:
    """Gradient of the residual stream: `exact` `[M, D]` in the residual's dtype, and the same in the compute dtype in
    the first D columns of `extended`, whose last columns the consuming group fills."""

    exact: Tensor
    extended: Tensor

    def of(self, rows: slice) -> StreamGradient:
        """A view of some rows."""
        return StreamGradient(self.exact[rows], self.extended[rows])

    def forget(self) -> None:
        """Let its memory go while those who called still hold this object."""
        self.exact = self.extended = self.exact.new_empty(0)
