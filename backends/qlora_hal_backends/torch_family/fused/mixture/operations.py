"""What the feed-forward of a mixture needs beside grouped products, as one interface with two implementations: Triton's
(`kernels`) on a GPU, plain torch (`reference`) anywhere.

Shapes: M tokens, E experts, k experts a token, T = M * k rows sorted by expert, D hidden size, F the experts' width.
The k choices of all tokens are M * k places, those of a token behind one another. Statistics and sums are float32
inside each operation, and each result is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight
from qlora_hal_backends.torch_family.fused.families import Activation


class Scores(Enum):
    """Of an expert, from its logit."""

    SOFTMAX = "softmax over all experts"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True)
class Router:
    """What a router makes of its logits: a score of each expert, and the best `each` of them, the lower number where
    equal. Their scores are the weights, divided by their sum where it `normalizes`, times `factor`, rounded to `dtype`.

    The best are found by scores with a correction added, where a layer has one, which is not in the weights (Wang et
    al. 2024). Where experts are in `groups`, it is the best of the best `groups_kept` of them: a group counts for its
    two best together (DeepSeek-V3). With `exact_logits` these are in float32, whatever they are computed from.
    """

    each: int
    normalizes: bool
    dtype: torch.dtype
    scores: Scores = Scores.SOFTMAX
    factor: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    exact_logits: bool = False


@dataclass(frozen=True, slots=True)
class Routed:
    """Where the tokens of some rows go."""

    logits: Tensor  # [M, E]
    experts: Tensor  # int16 [M, k]
    weights: Tensor  # [M, k]
    order: Tensor  # int64 [T]: which place stands in a row
    back: Tensor  # int64 [T]: in which row a place stands
    ends: Tensor  # int32 [E]: rows ends[e - 1] to ends[e] are expert e's

    @property
    def rows(self) -> int:
        return self.order.shape[0]


class MixtureOperations(Protocol):
    activation: Activation

    def dequantize_stack(self, base: StackedWeight, out: Tensor) -> None:
        """Write the weights `[E, rows, columns]` into an `out` of any strides but the last."""
        ...

    def route(self, logits: Tensor, correction: Tensor | None, router: Router) -> tuple[Tensor, Tensor]:
        """(weights `[M, k]` in the router's dtype, experts int16 `[M, k]`), the best first. `correction` is float32
        `[E]`."""
        ...

    def route_backward(self, logits: Tensor, experts: Tensor, gradient: Tensor, router: Router, out: Tensor) -> None:
        """Gradient of the logits from that of the weights, float32 `[M, k]`, into `out` `[M, E]`."""
        ...

    def sort(self, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """`order`, `back` and `ends` of `Routed` from the choices int16 `[M, k]`. The rows of an expert are in the
        order of their places. Nothing waits for the device."""
        ...

    def send(self, tokens: Tensor, back: Tensor, out: Tensor) -> None:
        """Each token, from a strided `[M, D]`, into its rows of a strided `[T, D]`."""
        ...

    def scale(self, thin: Tensor, factor: float, copy: Tensor) -> None:
        """Multiply a contiguous `thin` `[T, R]` in place, and write it into a strided `copy` as well."""
        ...

    def collect(self, rows: Tensor, back: Tensor, addend: Tensor | None, out: Tensor) -> None:
        """The sum of each token's rows, which are strided, and of `addend` `[M, D]`, where given, into `out`."""
        ...

    def weighted_swiglu(self, gate_up: Tensor, weights: Tensor, order: Tensor, out: Tensor) -> None:
        """weight * activation(gate) * up of a strided `gate_up` `[T, 2F]` into a strided `out` `[T, F]`. A row's weight
        is that of its place in `weights` `[M, k]`."""
        ...

    def weighted_swiglu_backward(
        self,
        gate_up: Tensor,
        gradient: Tensor,
        weights: Tensor,
        order: Tensor,
        out: Tensor,
        product: Tensor,
        weight_gradient: Tensor,
    ) -> None:
        """Gradients of `gate_up` into a strided `out` and of the weights into `weight_gradient` float32 `[M, k]`;
        `product` receives the forward output again. `gradient` and `product` are strided `[T, F]` and may be one, as
        may `gate_up` and `out`."""
        ...

    def add_to_experts(self, gradient: Tensor, products: Tensor, ends: Tensor) -> None:
        """Add `products` `[E, m, n]` to `gradient`, float32 of the same shape, for experts that have rows; what stands
        there for the others is not read. Matrices of `gradient` are contiguous, rows of `products`."""
        ...
