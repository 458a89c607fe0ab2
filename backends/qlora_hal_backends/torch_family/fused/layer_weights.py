"""One decoder layer's weights as the fused step multiplies with them.

Projections that read the same input form a group (query, key, value; gate, up) and are one product. The adapter rides
in the same product, as further terms of its sum:

    forward    y  = [x | t] [W | B]^T          t = scale * x A^T
    backward   dx = [dy | v] [W ; A]           v = scale * dy B

One buffer `[N + R, K + R]` holds W, B beside it and A below it, so both products read views of it. The sum runs in
the product's float32 accumulator and is rounded once, at no measurable cost (R is 16 to 64 of thousands of columns).
The four buffers hold one layer at a time.

                 K columns    R columns
    N rows     [    W       |    B     ]        W: the group's weights, one below the other
    R rows     [    A       |  unused  ]        B: block-diagonal over the group's adapted projections
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.operations import HeadNorm, Operations
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear, product_in_float32

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "feed_forward_in": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward_out": ("mlp.down_proj",),
}

RANK_MULTIPLE = 8
"""Ranks are padded with zeros to this: matrix kernels want rows that start at multiples of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one projection of a group lies; `rank` is None where no layer adapts it."""

    module: str
    rows: slice
    rank: slice | None


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """One layer's share of a group. The lists run over the group's slots, and over the adapted slots."""

    rows: int
    bases: Sequence[BaseWeight]
    bias: Tensor | None
    adapter_sources: Sequence[Tensor]
    adapter_targets: Sequence[Tensor]
    a_gradients: Sequence[tuple[Tensor, slice]]
    b_gradients: Sequence[tuple[Tensor, slice, slice]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """All that is constant in one decoder layer, and where its adapter's gradients go."""

    input_norm: Tensor
    middle_norm: Tensor
    head_norm: HeadNorm | None
    groups: Mapping[str, GroupWeights]


class GroupBuffer:
    """The buffer of one group and the four products that read it."""

    def __init__(self, slots: Sequence[Slot], columns: int, ranks: int, scale: float, like: Tensor) -> None:
        self.slots = slots
        self.rows = slots[-1].rows.stop
        self.columns = columns
        self.ranks = -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE
        self._scale = scale
        # Zero where no projection writes: off the diagonal of B, and in the padded ranks.
        self._buffer = torch.zeros(self.rows + self.ranks, columns + self.ranks, dtype=like.dtype, device=like.device)
        self.w = self._buffer[: self.rows, :columns]
        self.a = self._buffer[self.rows :, :columns]
        self.b = self._buffer[: self.rows, columns:]
        self._forward = self._buffer[: self.rows].t()
        self._backward = self._buffer[:, :columns]

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def new_input(self, rows: int) -> Tensor:
        """Uninitialized `[rows, K + R]`: the caller fills the first K columns, `low_rank` the rest."""
        return self._buffer.new_empty(rows, self.columns + self.ranks)

    def new_gradient(self, rows: int) -> Tensor:
        """Uninitialized `[rows, N + R]`."""
        return self._buffer.new_empty(rows, self.rows + self.ranks)

    def low_rank(self, x: Tensor, tail: Tensor | None = None) -> Tensor | None:
        """t = scale * x A^T `[rows, R]`, in `tail` where given."""
        return self._thin(x, self.a.t(), tail)

    def low_rank_gradient(self, gradient: Tensor) -> Tensor | None:
        """Fill and return v = scale * dy B, the last R columns of `gradient`."""
        return self._thin(gradient[:, : self.rows], self.b, gradient[:, self.rows :])

    def product(self, extended: Tensor, bias: Tensor | None) -> Tensor:
        """y of an input made by `new_input`."""
        return extended @ self._forward if bias is None else torch.addmm(bias, extended, self._forward)

    def product_apart(self, x: Tensor, low_rank: Tensor | None, bias: Tensor | None) -> Tensor:
        """y of an input that could not be written into an extended buffer.

        The adapter's product comes first and the base product accumulates onto it, so the sum is still in float32.
        """
        if low_rank is None:
            return x @ self.w.t() if bias is None else torch.addmm(bias, x, self.w.t())
        y = low_rank @ self.b.t() if bias is None else torch.addmm(bias, low_rank, self.b.t())
        return y.addmm_(x, self.w.t())

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """dx of a gradient whose last R columns hold v."""
        return gradient @ self._backward

    def _thin(self, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor | None:
        if not self.ranks:
            return None
        if out is None:
            out = left.new_empty(left.shape[0], self.ranks)
        # With beta 0 the uninitialized `out` is not read.
        return torch.addmm(out, left, right, beta=0, alpha=self._scale, out=out)


class LayerBuffers:
    """The four buffers, and whose weights are in them."""

    def __init__(self, groups: Mapping[str, GroupBuffer], operations: Operations) -> None:
        self.groups = groups
        self._operations = operations
        self._base_of: LayerWeights | None = None
        self._adapter_of: LayerWeights | None = None

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups.values())

    def hold(self, layer: LayerWeights) -> None:
        """Dequantize a layer and copy its adapter beside it, unless it is there already."""
        if self._base_of is not layer:
            self._base_of = None
            for name, buffer in self.groups.items():
                for slot, base in zip(buffer.slots, layer.groups[name].bases, strict=True):
                    self._operations.dequantize(base, buffer.w[slot.rows])
            self._base_of = layer
        if self._adapter_of is not layer:
            targets = [target for group in layer.groups.values() for target in group.adapter_targets]
            sources = [source for group in layer.groups.values() for source in group.adapter_sources]
            if targets:
                torch._foreach_copy_(targets, sources)  # one call for the seven pairs
            self._adapter_of = layer

    def forget_adapter(self) -> None:
        """The adapter was updated, or may have been."""
        self._adapter_of = None


def make_buffers(layers: Sequence[object], flat: FlatAdapter, like: Tensor, operations: Operations) -> LayerBuffers:
    """Buffers for layers of one shape. A projection that any layer adapts has its ranks in every layer."""
    adapted = set(flat.adapter.config.target_modules)
    groups = {}
    for name, modules in GROUPS.items():
        linears = [linear_of(layers[0], module) for module in modules]
        anywhere = [any(path.endswith(f".{module}") for path in adapted) for module in modules]
        slots, ranks = _slots(modules, linears, anywhere, flat.adapter.config.r)
        groups[name] = GroupBuffer(slots, linears[0].in_features, ranks, flat.adapter.config.scale, like)
    return LayerBuffers(groups, operations)


def _slots(
    modules: Sequence[str], linears: Sequence[FrozenLinear], adapted: Sequence[bool], r: int
) -> tuple[list[Slot], int]:
    slots: list[Slot] = []
    row = ranks = 0
    for module, linear, has_rank in zip(modules, linears, adapted, strict=True):
        slots.append(Slot(module, slice(row, row + linear.out_features), slice(ranks, ranks + r) if has_rank else None))
        row += linear.out_features
        ranks += r if has_rank else 0
    return slots, ranks


def layer_weights(layer: object, path: str, buffers: LayerBuffers, flat: FlatAdapter) -> LayerWeights:
    """Collect one layer. `path` is its module path, as the adapter names it."""
    attention = layer.self_attn  # type: ignore[attr-defined]
    head_norm = None
    if hasattr(attention, "q_norm"):
        weights = torch.stack((attention.q_norm.weight.detach(), attention.k_norm.weight.detach()))
        head_norm = HeadNorm(weights, float(attention.q_norm.variance_epsilon))
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),  # type: ignore[attr-defined]
        middle_norm=layer.post_attention_layernorm.weight.detach(),  # type: ignore[attr-defined]
        head_norm=head_norm,
        groups={name: _group_weights(layer, path, buffer, flat) for name, buffer in buffers.groups.items()},
    )


def _group_weights(layer: object, path: str, buffer: GroupBuffer, flat: FlatAdapter) -> GroupWeights:
    linears = [linear_of(layer, slot.module) for slot in buffer.slots]
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    a_gradients: list[tuple[Tensor, slice]] = []
    b_gradients: list[tuple[Tensor, slice, slice]] = []
    for slot in buffer.slots:
        if slot.rank is None:
            continue
        a_target, b_target = buffer.a[slot.rank], buffer.b[slot.rows, slot.rank]
        targets += (a_target, b_target)
        a_name, b_name = (f"base_model.model.{path}.{slot.module}.lora_{side}.weight" for side in "AB")
        if a_name in flat.slices:
            sources += (flat.view(flat.compute, a_name), flat.view(flat.compute, b_name))
            a_gradients.append((flat.view(flat.gradients, a_name), slot.rank))
            b_gradients.append((flat.view(flat.gradients, b_name), slot.rows, slot.rank))
        else:  # adapted in other layers only
            sources += (a_target.new_zeros(1, 1).expand_as(a_target), b_target.new_zeros(1, 1).expand_as(b_target))
    return GroupWeights(
        rows=buffer.rows,
        bases=[_base_of(linear) for linear in linears],
        bias=_group_bias(linears, buffer.w),
        adapter_sources=sources,
        adapter_targets=targets,
        a_gradients=a_gradients,
        b_gradients=b_gradients,
    )


def _group_bias(linears: Sequence[FrozenLinear], like: Tensor) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [like.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    )


class AdapterGradients:
    """Gathers the terms of one layer's adapter gradient and adds them in one call.

    The products stay float32, like the master weights they update. They are added, not stored: a window has several
    micro-batches.
    """

    def __init__(self) -> None:
        self._gradients: list[Tensor] = []
        self._terms: list[Tensor] = []

    def of_a(self, group: GroupWeights, v: Tensor | None, x: Tensor) -> None:
        """dA = v^T x, for each adapted projection of the group."""
        if v is None or not group.a_gradients:
            return
        products = product_in_float32(v.t(), x)
        for gradient, rank in group.a_gradients:
            self._gradients.append(gradient)
            self._terms.append(products[rank])

    def of_b(self, group: GroupWeights, gradient: Tensor, t: Tensor | None) -> None:
        """dB = dy^T t, the diagonal blocks of the group's product."""
        if t is None or not group.b_gradients:
            return
        products = product_in_float32(gradient[:, : group.rows].t(), t)
        for part, rows, rank in group.b_gradients:
            self._gradients.append(part)
            self._terms.append(products[rows, rank])

    def add(self) -> None:
        if self._gradients:
            torch._foreach_add_(self._gradients, self._terms)


def linear_of(layer: object, module: str) -> FrozenLinear:
    linear = layer.get_submodule(module)  # type: ignore[attr-defined]
    assert isinstance(linear, FrozenLinear), f"{module} was checked when the layer was accepted"
    return linear


def _base_of(linear: FrozenLinear) -> BaseWeight:
    assert linear.base is not None, "the base is loaded before an adapter is attached"
    return linear.base
