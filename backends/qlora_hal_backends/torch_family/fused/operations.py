"""The elementwise operations of the fused step, as one interface with two implementations.

`kernels` computes them with Triton on a GPU. `reference` computes them with plain torch anywhere: the schedule of a
layer is tested with it where there is no GPU, and the kernels are tested against it.

Shapes: M = batch * time rows, D hidden size, F feed-forward size, h heads, d head size. "Strided" tensors are views
`[M, n]` of a wider buffer whose last dimension is contiguous. Statistics and sums are float32 inside each operation,
and each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.fused.families import Activation


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles of the rotary embedding: float32 tables `[longest, pairs]`, and each row's position `[M]` in them. Where
    `pairs` are fewer than d / 2, they are of the first 2 * pairs coordinates of a head, and the others do not turn."""

    cos: Tensor
    sin: Tensor
    positions: Tensor

    @property
    def pairs(self) -> int:
        return self.cos.shape[1]


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head before the rotation (Qwen 3). `weights` is `[2, d]`: query, key."""

    weights: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Placements:
    """Matrices to copy from one flat tensor into another, as rows of
    (first source element, first target element, rows, columns, elements from target row to target row).

    Source rows are contiguous; a negative source writes zeros. `table` holds `entries` on the device, int64.
    """

    entries: Sequence[tuple[int, int, int, int, int]]
    table: Tensor
    largest: int = field(init=False)
    """Elements of the largest matrix. Found once: a mixture has hundreds in a layer."""

    def __post_init__(self) -> None:
        largest = max((rows * columns for _, _, rows, columns, _ in self.entries), default=0)
        object.__setattr__(self, "largest", largest)


@dataclass(frozen=True, slots=True)
class Dropout:
    """LoRA dropout of some rows (`qlora_hal.contract.dropout`): their words int32 `[M]`, and the share dropped."""

    tokens: Tensor
    rate: float

    def of(self, rows: slice) -> Dropout:
        return Dropout(self.tokens[rows], self.rate)


@dataclass(frozen=True, slots=True)
class Masks:
    """What a group's adapted projections keep of their common input: each has words of its own, int32 `[n, K]`."""

    dropout: Dropout
    channels: Tensor
    rank: int

    @property
    def rescaled(self) -> float:
        """What is kept counts for what is dropped, too."""
        return 1.0 / (1.0 - self.dropout.rate)


class Operations(Protocol):
    """What a decoder layer needs beside matrix products and attention."""

    activation: Activation

    def dequantize(self, base: BaseWeight, out: Tensor) -> None:
        """Write the weight `[rows, columns]` into a strided `out`."""
        ...

    def place(self, source: Tensor, target: Tensor, placements: Placements) -> None:
        """Copy all matrices of `placements` between two flat tensors of one dtype."""
        ...

    def copy_rows(self, source: Tensor, out: Tensor) -> None:
        """Copy `[M, n]` into a strided `out`."""
        ...

    def add_norm(
        self,
        residual: Tensor,
        pending: Tensor | None,
        weight: Tensor,
        epsilon: float,
        out: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        """Return h = residual + pending `[M, D]`, in `into` where given, and write rms_norm(h) * weight into a strided
        `out`. Without `pending`, h is `residual` itself, which may be strided."""
        ...

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
        """Gradient of h, which may be strided: the norm's, plus `residual_gradient`. Both gradients may be strided.

        Written to the strided `out` in the compute dtype, which may be `gradient`, and, where given, to `out_exact`
        `[M, D]`. `normed` receives the forward output again.
        """
        ...

    def swiglu(self, gate_up: Tensor, out: Tensor) -> None:
        """activation(gate) * up of a strided `gate_up` `[M, 2F]` into a strided `out` `[M, F]`; the activation is the
        model's."""
        ...

    def swiglu_backward(self, gate_up: Tensor, gradient: Tensor, out: Tensor, product: Tensor) -> None:
        """Gradient of a strided `gate_up` into a strided `out`; `product` `[M, F]` receives the forward output again.
        `out` may be `gate_up`, and `product` `gradient`."""
        ...

    def rotate(self, source: Tensor, out: Tensor, heads: HeadCounts, rotary: Rotary, norm: HeadNorm | None) -> None:
        """Norm (where given) and rotate the query and key columns of the strided `source`; `out` may be `source`."""
        ...

    def rotate_backward(
        self,
        gradient: Tensor,
        out: Tensor,
        rotary: Rotary,
        norm: HeadNorm | None,
        source: Tensor,
        is_key: bool,
    ) -> None:
        """Gradient of the columns before `rotate`, from `[batch, heads, time, d]` of any strides.

        `out` and `source` are the strided columns of these heads; `source` (before the norm) is read with a norm only.
        """
        ...

    def drop(self, x: Tensor, masks: Masks, number: int, out: Tensor) -> None:
        """`x` `[M, K]` where projection `number` keeps it, 0 elsewhere; both may be strided. Not rescaled."""
        ...

    def add_dropped(self, product: Tensor, v: Tensor, a: Tensor, masks: Masks, out: Tensor) -> None:
        """`product` `[M, K]` in float32 plus, for each projection, v A where it keeps its input.

        Its v and A are the columns `[M, r]` of the strided `v` and the rows `[r, K]` of the strided `a`.
        """
        ...

    def cross_entropy(self, logits: Tensor, targets: Tensor, scale: float, with_gradient: bool) -> Tensor:
        """Losses `[rows]` in float32; with a gradient, `logits` is overwritten by that of `scale * sum(losses)`."""
        ...
