"""One decoder layer's weights as the fused step multiplies with them.

Projections that read the same input form a group (query, key, value; gate, up) and are one product. The adapter rides
in the same product, as further terms of its sum:

    forward    y  = [x | t] [W | B]^T          t = scale * x A^T
    backward   dx = [dy | v] [W ; A]           v = scale * dy B

It must ride inside: cuBLAS rounds a bfloat16 product before it adds `beta * C` (seen on an H200 with CUDA 13.0 for
`addmm` of every kind), so a young adapter that is added to the product afterwards, or before as C, loses half of its
effect and more to rounding.

One buffer `[N + R, K + R]` holds W, B beside it and A below it, so both products read views of it (`JoinedProducts`;
`fused.fp8` has others). The sum runs in the product's float32 accumulator and is rounded once, at no measurable cost (R
is 16 to 64 of thousands of columns). The buffers hold one layer at a time. Where memory is dear they share it
(`LayerBuffers`): a group is then brought when a product asks for it.

                 K columns    R columns
    N rows     [    W       |    B     ]        W: the group's weights, one below the other
    R rows     [    A       |  unused  ]        B: block-diagonal over the group's adapted projections
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.flat_adapter import ALIGNMENT, FlatAdapter
from qlora_hal_backends.torch_family.fused.mixture.weights import MixtureWeights
from qlora_hal_backends.torch_family.fused.operations import Dropout, HeadNorm, Masks, Operations, Placements
from qlora_hal_backends.torch_family.lora_linear import product_in_float32

RANK_MULTIPLE = 8
"""Ranks are padded with zeros to this: matrix kernels want rows that start at multiples of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one projection of a group lies; `rank` is None where no layer adapts it."""

    module: str
    rows: slice
    rank: slice | None


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a group multiplies. `ranks` is R, padded."""

    slots: Sequence[Slot]
    columns: int
    ranks: int

    @property
    def rows(self) -> int:
        return sum(slot.rows.stop - slot.rows.start for slot in self.slots)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows + self.ranks, self.columns + self.ranks


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """One layer's share of a group: its bases in the order of the slots, and the gradients of its adapted ones."""

    rows: int
    bases: Sequence[BaseWeight]
    bias: Tensor | None
    adapter: Placements
    """Its A and B, with zeros wherever else the products look: for a buffer whose memory another group had."""
    a_gradients: Sequence[tuple[Tensor, slice]]
    b_gradients: Sequence[tuple[Tensor, slice, slice]]
    channels: Tensor | None = None
    """Dropout's words of each adapted projection's inputs, int32 `[n, K]`."""
    rank: int = 0

    def masks(self, dropout: Dropout | None) -> Masks | None:
        return None if dropout is None or self.channels is None else Masks(dropout, self.channels, self.rank)


@dataclass(frozen=True, slots=True)
class Join:
    """What happens to a branch before it is added to the stream: a norm (Gemma 2 and 3) or a factor (Granite)."""

    norm: Tensor | None
    scale: float


@dataclass(frozen=True, slots=True)
class JointNorm:
    """RMS norm over all heads of queries at once, and over all of keys. Where there is a `limit`, queries, keys and
    values are cut off at plus and minus it then (OLMoE)."""

    query: Tensor
    key: Tensor
    epsilon: float
    limit: float | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """All that is constant in one decoder layer, and where its adapter comes from and its gradients go."""

    input_norm: Tensor
    middle_norm: Tensor
    head_norm: HeadNorm | None
    joint_norm: JointNorm | None
    window: int | None  # how many tokens one sees, itself among them; None: all before it
    rotary: str  # which of the model's rotary tables
    attention_join: Join | None
    feed_forward_join: Join | None
    groups: Mapping[str, GroupWeights]
    adapter: Placements
    experts: MixtureWeights | None = None  # None: its feed-forward is dense


class GroupProducts(Protocol):
    """The products of one group, with the adapter's terms in their sums. One object serves all layers of a model."""

    @property
    def a(self) -> Tensor:
        """Where the adapter's A is placed, `[R, K]` in the compute dtype."""
        ...

    @property
    def b(self) -> Tensor:
        """Where its B is placed, `[N, R]`, block-diagonal."""
        ...

    def take(self, group: GroupWeights) -> None:
        """From here on the base is that of this layer's group."""
        ...

    def forward(self, extended: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """x W^T + t B^T + bias of `[x | t]` `[M, K + R]`, in `out` where given."""
        ...

    def backward(self, extended: Tensor) -> Tensor:
        """dy W + v A of `[dy | v]` `[M, N + R]`."""
        ...

    def base_backward(self, gradient: Tensor) -> Tensor:
        """dy W alone of a strided dy `[M, N]`, in float32."""
        ...


class JoinedProducts:
    """In the compute dtype: the base is decoded into one buffer with its adapter, and both are one product."""

    def __init__(self, shape: GroupShape, buffer: Tensor, operations: Operations) -> None:
        rows, columns = shape.rows, shape.columns
        self._slots, self._operations = shape.slots, operations
        self._w = buffer[:rows, :columns]
        self.a = buffer[rows:, :columns]
        self.b = buffer[:rows, columns:]
        self._forward = buffer[:rows].t()
        self._backward = buffer[:, :columns]

    def take(self, group: GroupWeights) -> None:
        for slot, base in zip(self._slots, group.bases, strict=True):
            self._operations.dequantize(base, self._w[slot.rows])

    def forward(self, extended: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if bias is None:
            return torch.mm(extended, self._forward, out=out)
        return torch.addmm(bias, extended, self._forward, out=out)

    def backward(self, extended: Tensor) -> Tensor:
        return extended @ self._backward

    def base_backward(self, gradient: Tensor) -> Tensor:
        return product_in_float32(gradient, self._w)


@dataclass(frozen=True, slots=True)
class Rooms:
    """The memory of all groups. `adapters` is the flat tensor in which their A and B lie, `rivals` the groups whose
    base has the same memory."""

    adapters: Tensor
    products: Mapping[str, GroupProducts]
    rivals: Mapping[str, Sequence[str]]


MakeRooms = Callable[[Mapping[str, GroupShape], Tensor, bool], Rooms]
"""For groups of these shapes, with a tensor of the compute dtype on the device, in shared memory or apart."""


def joined_rooms(operations: Operations, shapes: Mapping[str, GroupShape], like: Tensor, shared: bool) -> Rooms:
    # Zeros stay where no projection writes: off the diagonal of B, and in the padded ranks. Where memory is shared
    # they do not, and are written with the adapter.
    memory, parts, rivals = divided({name: math.prod(shape.size) for name, shape in shapes.items()}, like, shared)
    products = {name: JoinedProducts(shape, parts[name].view(shape.size), operations) for name, shape in shapes.items()}
    return Rooms(memory, products, rivals)


def divided(
    sizes: Mapping[str, int], like: Tensor, shared: bool
) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Sequence[str]]]:
    """A flat tensor of zeros, each group's part of it, and the groups whose parts meet."""
    aligned = {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
    starts = _starts_in_turns(aligned) if shared else _starts_apart(aligned)
    ends = {name: starts[name] + size for name, size in aligned.items()}
    memory = torch.zeros(max(ends.values()), dtype=like.dtype, device=like.device)
    rivals = {
        name: [other for other in sizes if other != name and starts[other] < ends[name] and starts[name] < ends[other]]
        for name in sizes
    }
    return memory, {name: memory[starts[name] : starts[name] + size] for name, size in sizes.items()}, rivals


def _is_here() -> None:
    """Of products whose layer is there before they are asked for."""


class GroupBuffer:
    """One group: its products, and the thin ones of its adapter. `bring` has the layer's weights in their place."""

    def __init__(
        self,
        shape: GroupShape,
        scale: float,
        products: GroupProducts,
        operations: Operations,
        bring: Callable[[], None] = _is_here,
    ) -> None:
        self._bring = bring
        self._operations = operations
        self.slots = shape.slots
        self.adapted = [slot.rank for slot in shape.slots if slot.rank is not None]
        self.rows, self.columns, self.ranks = shape.rows, shape.columns, shape.ranks
        self._scale = scale
        self._products = products
        self.a, self.b = products.a, products.b

    def new_input(self, rows: int) -> Tensor:
        """Uninitialized `[rows, K + R]`: the caller fills the first K columns, `low_rank` the rest."""
        return self.a.new_empty(rows, self.columns + self.ranks)

    def new_gradient(self, rows: int) -> Tensor:
        """Uninitialized `[rows, N + R]`."""
        return self.a.new_empty(rows, self.rows + self.ranks)

    def low_rank(self, x: Tensor, tail: Tensor | None = None, masks: Masks | None = None) -> Tensor | None:
        """t = scale * x A^T `[rows, R]`, in `tail` where given; None where nothing of the group is adapted. With
        `masks` each projection has what it keeps of x, scaled anew."""
        if masks is None or not self.ranks:
            return self._thin(x, self.a.t(), tail)
        self._bring()
        t = x.new_empty(x.shape[0], self.ranks) if tail is None else tail
        for number, rank in enumerate(self.adapted):
            dropped = torch.empty_like(x, memory_format=torch.contiguous_format)
            self._operations.drop(x, masks, number, dropped)
            scale = self._scale * masks.rescaled
            torch.addmm(t[:, rank], dropped, self.a[rank].t(), beta=0, alpha=scale, out=t[:, rank])
        t[:, self.adapted[-1].stop :] = 0.0  # the padded ranks meet zeros of B, and must be finite for it
        return t

    def low_rank_gradient(self, gradient: Tensor, masks: Masks | None = None) -> Tensor | None:
        """Fill and return v = scale * dy B, the last R columns of `gradient`."""
        scale = 1.0 if masks is None else masks.rescaled
        return self._thin(gradient[:, : self.rows], self.b, gradient[:, self.rows :], scale)

    def product(self, extended: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """y of an input made by `new_input`, in `out` where given."""
        self._bring()
        return self._products.forward(extended, bias, out)

    def input_gradient(self, gradient: Tensor, masks: Masks | None = None) -> Tensor:
        """dx of a gradient whose last R columns hold v."""
        self._bring()
        if masks is None or not self.ranks:
            return self._products.backward(gradient)
        # What passes through the adapter is dropped where its input was, so it cannot ride in the product.
        base = self._products.base_backward(gradient[:, : self.rows])
        out = torch.empty_like(base, dtype=gradient.dtype)
        self._operations.add_dropped(base, gradient[:, self.rows :], self.a, masks, out)
        return out

    def _thin(self, left: Tensor, right: Tensor, out: Tensor | None, scale: float = 1.0) -> Tensor | None:
        if not self.ranks:
            return None
        self._bring()
        if out is None:
            out = left.new_empty(left.shape[0], self.ranks)
        # With beta 0 the uninitialized `out` is not read.
        return torch.addmm(out, left, right, beta=0, alpha=self._scale * scale, out=out)


class LayerBuffers:
    """The groups of all layers, and whose weights are in their rooms.

    Apart, each group has its own memory, and `hold` fills all of a layer's. `shared`, the attention's two groups and
    the first of the feed-forward take turns in one place, and the second of the feed-forward has its own, for these two
    alternate tile by tile. Of a 65B layer that is two thirds; backward decodes the attention twice for it.
    """

    def __init__(
        self,
        shapes: Mapping[str, GroupShape],
        flat: FlatAdapter,
        like: Tensor,
        operations: Operations,
        make_rooms: MakeRooms,
        *,
        shared: bool = False,
    ) -> None:
        self._rooms = make_rooms(shapes, like, shared)
        self._shared = shared
        self._adapter = flat.compute
        self._operations = operations
        self._layer: LayerWeights | None = None
        self._base_of: dict[str, LayerWeights] = {}
        self._adapter_of: dict[str, LayerWeights] = {}
        scale = flat.adapter.config.scale
        self.groups = {
            name: GroupBuffer(
                shape,
                scale,
                self._rooms.products[name],
                operations,
                partial(self._bring, name) if shared else _is_here,
            )
            for name, shape in shapes.items()
        }

    def hold(self, layer: LayerWeights) -> None:
        """From here on the products are of this layer, with the adapter as it is now."""
        self._layer = layer
        if self._shared:
            return
        for name in layer.groups:
            self._take(name, layer)
        if any(self._adapter_of.get(name) is not layer for name in layer.groups):
            self._operations.place(self._adapter, self._rooms.adapters, layer.adapter)
            self._adapter_of.update(dict.fromkeys(layer.groups, layer))

    def forget_adapter(self) -> None:
        """The adapter was updated, or may have been."""
        self._adapter_of.clear()

    def _bring(self, name: str) -> None:
        layer = self._layer
        assert layer is not None, "a layer is held before its products are asked for"
        self._take(name, layer)
        if self._adapter_of.get(name) is not layer:
            self._operations.place(self._adapter, self._rooms.adapters, layer.groups[name].adapter)
            self._adapter_of[name] = layer

    def _take(self, name: str, layer: LayerWeights) -> None:
        """Let a group's base be that of a layer, unless it is already."""
        if self._base_of.get(name) is layer:
            return
        for gone in (name, *self._rooms.rivals[name]):
            self._base_of.pop(gone, None)
            self._adapter_of.pop(gone, None)
        self._rooms.products[name].take(layer.groups[name])
        self._base_of[name] = layer


def _starts_apart(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))


def _starts_in_turns(sizes: Mapping[str, int]) -> dict[str, int]:
    """The first feed-forward group lies over the attention's two, the second behind them all."""
    attention = sizes["attention_in"] + sizes["attention_out"]
    return {
        "attention_in": 0,
        "attention_out": sizes["attention_in"],
        "feed_forward_in": 0,
        "feed_forward_out": max(attention, sizes["feed_forward_in"]),
    }


class AdapterGradients:
    """Gathers the terms of one layer's adapter gradient and adds them in one call.

    The products stay float32, like the master weights they update. They are added, not stored: a window has several
    micro-batches.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._gradients: list[Tensor] = []
        self._terms: list[Tensor] = []

    def of_a(self, group: GroupWeights, v: Tensor | None, x: Tensor, masks: Masks | None = None) -> None:
        """dA = v^T x, for each adapted projection of the group; with `masks` of what it keeps of x."""
        if v is None or not group.a_gradients:
            return
        if masks is not None:
            for gradient, rank in group.a_gradients:
                dropped = torch.empty_like(x, memory_format=torch.contiguous_format)
                self._operations.drop(x, masks, rank.start // masks.rank, dropped)
                self._gradients.append(gradient)
                self._terms.append(product_in_float32(v[:, rank].t(), dropped))
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
        """Add what was gathered, and gather anew: no gradient may stand twice in one call."""
        if self._gradients:
            torch._foreach_add_(self._gradients, self._terms)
        self._gradients, self._terms = [], []
