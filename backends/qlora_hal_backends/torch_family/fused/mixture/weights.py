"""The experts of one layer as grouped products multiply with them.

As `fused.layer_weights` has it for one weight, with a dimension of experts before: gate and up of an expert lie in one
buffer `[N + R, K + R]` with B beside and A below them, and the adapter rides in the same product,

    forward    y_e  = [x_e | t_e] [W_e | B_e]^T          t_e = scale * x_e A_e^T
    backward   dx_e = [dy_e | v_e] [W_e ; A_e]           v_e = scale * dy_e B_e

Both read views of `[E, N + R, K + R]`, so nothing is joined in a step: weights are decoded, and adapters copied, to
where the products look. Rows are sorted by expert, and rows `ends[e - 1]` to `ends[e]` are expert e's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations
from qlora_hal_backends.torch_family.fused.operations import Operations, Placements

if TYPE_CHECKING:
    from qlora_hal_backends.torch_family.fused.layer_weights import GroupShape


@dataclass(frozen=True, slots=True)
class StackWeights:
    """One layer's share of a group of stacks: bases in the order of the slots, and the gradients of adapted ones
    `[E, r, K]` and `[E, n, r]`, with where they are in the group's products."""

    bases: Sequence[StackedWeight]
    a_gradients: Sequence[tuple[Tensor, slice]]
    b_gradients: Sequence[tuple[Tensor, slice, slice]]


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """All that is constant in the experts of one layer, and where their adapters come from and their gradients go."""

    router: Tensor  # [E, D]
    correction: Tensor | None  # float32 [E]; of the scores that experts are chosen by
    shared_gate: Tensor | None  # [1, D]
    into: StackWeights  # gate and up
    out: StackWeights  # down
    adapter: Placements


class StackBuffer:
    """The buffer of one group of stacks and the products that read it; `shape` is of one expert's part."""

    def __init__(self, shape: GroupShape, scale: float, memory: Tensor, operations: MixtureOperations) -> None:
        self.slots = shape.slots
        self.rows, self.columns, self.ranks = shape.rows, shape.columns, shape.ranks
        self._scale = scale
        self._operations = operations
        self.memory = memory  # [E, N + R, K + R]
        self.w = memory[:, : self.rows, : self.columns]
        self.a = memory[:, self.rows :, : self.columns]
        self.b = memory[:, : self.rows, self.columns :]
        self._forward = memory[:, : self.rows].transpose(1, 2)
        self._backward = memory[:, :, : self.columns]

    def decode(self, weights: StackWeights) -> None:
        for slot, base in zip(self.slots, weights.bases, strict=True):
            self._operations.dequantize_stack(base, self.w[:, slot.rows])

    def new_input(self, rows: int) -> Tensor:
        """Uninitialized `[rows, K + R]`: the caller fills the first K columns, `low_rank` the rest."""
        return self.memory.new_empty(rows, self.columns + self.ranks)

    def new_gradient(self, rows: int) -> Tensor:
        """Uninitialized `[rows, N + R]`."""
        return self.memory.new_empty(rows, self.rows + self.ranks)

    def low_rank(self, x: Tensor, ends: Tensor, tail: Tensor | None = None) -> Tensor | None:
        """t `[rows, R]`, and a copy of it in `tail` where given; None where nothing of the group is adapted."""
        return self._thin(x, self.a.transpose(1, 2), ends, tail)

    def low_rank_gradient(self, gradient: Tensor, ends: Tensor) -> Tensor | None:
        """v `[rows, R]`, and a copy of it in the last R columns of `gradient`."""
        return self._thin(gradient[:, : self.rows], self.b, ends, gradient[:, self.rows :])

    def product(self, extended: Tensor, ends: Tensor) -> Tensor:
        """y of an input made by `new_input`."""
        return grouped(extended, self._forward, ends)

    def input_gradient(self, gradient: Tensor, ends: Tensor) -> Tensor:
        """dx of a gradient whose last R columns hold v."""
        return grouped(gradient, self._backward, ends)

    def add_gradients(
        self,
        weights: StackWeights,
        ends: Tensor,
        *,
        of_a: tuple[Tensor | None, Tensor] | None = None,
        of_b: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """dA = v^T x of `of_a`, (v, x), and dB = dy^T t of `of_b`, (dy, t): each expert's over its rows."""
        if of_a is not None and of_a[0] is not None:
            products = grouped(of_a[0].t(), of_a[1], ends)
            for gradient, rank in weights.a_gradients:
                self._operations.add_to_experts(gradient, products[:, rank], ends)
        if of_b is not None and of_b[1] is not None:
            products = grouped(of_b[0].t(), of_b[1], ends)
            for gradient, rows, rank in weights.b_gradients:
                self._operations.add_to_experts(gradient, products[:, rows, rank], ends)

    def _thin(self, left: Tensor, right: Tensor, ends: Tensor, tail: Tensor | None) -> Tensor | None:
        if not self.ranks:
            return None
        thin = grouped(left, right, ends)
        if tail is None:
            return thin.mul_(self._scale)
        self._operations.scale(thin, self._scale, tail)
        return thin


class StackBuffers:
    """The buffers of a layer's experts, and whose weights are in them."""

    def __init__(
        self,
        into: GroupShape,
        out: GroupShape,
        experts: int,
        flat: FlatAdapter,
        like: Tensor,
        mixture: MixtureOperations,
        operations: Operations,
    ) -> None:
        sizes = [experts * shape.size[0] * shape.size[1] for shape in (into, out)]
        # Zeros stay where no projection writes: off the diagonal of B, and in the padded ranks.
        self._memory = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        parts = self._memory.split(sizes)
        scale = flat.adapter.config.scale
        self.into, self.out = (
            StackBuffer(shape, scale, part.view(experts, *shape.size), mixture)
            for shape, part in zip((into, out), parts, strict=True)
        )
        self._adapter = flat.compute
        self._operations = operations
        self._held: MixtureWeights | None = None
        self._is_adapter_here = False

    def hold(self, weights: MixtureWeights) -> None:
        """From here on the products are of these experts, with the adapter as it is now."""
        if self._held is not weights:
            self._held = None  # until all of them are here
            self.into.decode(weights.into)
            self.out.decode(weights.out)
            self._held, self._is_adapter_here = weights, False
        if not self._is_adapter_here:
            self._operations.place(self._adapter, self._memory, weights.adapter)
            self._is_adapter_here = True

    def forget_adapter(self) -> None:
        """The adapter was updated, or may have been."""
        self._is_adapter_here = False


def grouped(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The product of each group of rows with its expert's matrix; of two matrices of rows, one product for each group,
    `[E, m, n]`, in which what belongs to an expert without rows may be anything."""
    return torch.nn.functional.grouped_mm(left, right, offs=ends)
