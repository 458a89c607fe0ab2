"""A group's products in 8-bit floats, and the memory that they need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, Fp8Operations, LowRank
from qlora_hal_backends.torch_family.fused.layer_weights import GroupShape, GroupWeights, Rooms, divided

FP8_WORDS = "products with the base in fp8 (E4M3, scaled by row)"
"""For the run's `kernel_path`."""


class Fp8Products:
    """See `layer_weights.GroupProducts`. Tensor cores take 8-bit operands along the inner dimension alone, so E is
    decoded as it is for the forward product and transposed for the backward one, each when it is asked for. `memory`
    holds one of them or, twice as large, both."""

    def __init__(self, shape: GroupShape, memory: Tensor, a: Tensor, b: Tensor, operations: Fp8Operations) -> None:
        size = shape.rows * shape.columns
        self.a, self.b = a, b
        self._slots, self._operations = shape.slots, operations
        self._columns = shape.columns
        self._e = memory[:size].view(shape.rows, shape.columns)
        self._e_transposed = memory[-size:].view(shape.columns, shape.rows)
        self._holds_both = memory.numel() >= 2 * size
        self._here: list[Tensor] = []
        self._group: GroupWeights | None = None
        self._scales: dict[int, Tensor] = {}

    def take(self, group: GroupWeights) -> None:
        self._group, self._here = group, []

    def forward(self, extended: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        scales = self._decoded(self._e, self._e)
        x, t = extended[:, : self._columns], extended[:, self._columns :]
        if out is None:
            out = extended.new_empty(extended.shape[0], self._e.shape[0])
        rows = self._operations.quantize_rows(x, None)
        self._operations.product(rows, self._e, scales, _joined(t, self.b), bias, out)
        return out

    def backward(self, extended: Tensor) -> Tensor:
        rows = self._e.shape[0]
        out = extended.new_empty(extended.shape[0], self._columns)
        self._backward(extended[:, :rows], _joined(extended[:, rows:], self.a.t()), out)
        return out

    def base_backward(self, gradient: Tensor) -> Tensor:
        out = gradient.new_empty(gradient.shape[0], self._columns, dtype=torch.float32)
        self._backward(gradient, None, out)
        return out

    def _backward(self, gradient: Tensor, low_rank: LowRank | None, out: Tensor) -> None:
        scales = self._decoded(self._e_transposed, self._e_transposed.t())
        rows = self._operations.quantize_rows(gradient, scales)
        self._operations.product(rows, self._e_transposed, None, low_rank, None, out)

    def _decoded(self, room: Tensor, weight: Tensor) -> Tensor:
        """The row scales of the base, which `room` holds from here on; `weight` is its view `[N, K]`."""
        group = self._group
        assert group is not None, "a layer's base is taken before it is multiplied with"
        scales = self._scales_of(group)
        if not any(room is one for one in self._here):
            for slot, base in zip(self._slots, group.bases, strict=True):
                self._operations.decode(base, scales[slot.rows], weight[slot.rows])
            self._here = [*self._here, room] if self._holds_both else [room]
        return scales

    def _scales_of(self, group: GroupWeights) -> Tensor:
        """Found when a layer is first needed, and kept: a base is frozen, and four bytes a row are little. The layers
        of a model outlive its products."""
        found = self._scales.get(id(group))
        if found is None:
            found = torch.empty(self._e.shape[0], dtype=torch.float32, device=self._e.device)
            for slot, base in zip(self._slots, group.bases, strict=True):
                self._operations.row_scales(base, found[slot.rows])
            self._scales[id(group)] = found
        return found


def fp8_rooms(operations: Fp8Operations, shapes: Mapping[str, GroupShape], like: Tensor, shared: bool) -> Rooms:
    """One byte an element where layers are computed once in each direction, two where a layer that is recomputed goes
    both ways in turns: no more than `joined_rooms`. The adapters lie by themselves, whole."""
    adapters, parts, _ = divided(
        {name: shape.ranks * sum(_widths(shape)) for name, shape in shapes.items()}, like, False
    )
    copies = 2 if shared else 1
    sizes = {name: copies * shape.rows * shape.columns for name, shape in shapes.items()}
    _, memory, rivals = divided(sizes, like.new_empty(0, dtype=E4M3), shared)
    products = {}
    for name, shape in shapes.items():
        a, b = parts[name].split([shape.ranks * width for width in _widths(shape)])
        products[name] = Fp8Products(
            shape, memory[name], a.view(shape.ranks, shape.columns), b.view(shape.rows, shape.ranks), operations
        )
    return Rooms(adapters, products, rivals)


def _widths(shape: GroupShape) -> tuple[int, int]:
    return shape.columns, shape.rows


def _joined(left: Tensor, right: Tensor) -> LowRank | None:
    return LowRank(left, right) if left.shape[1] else None
