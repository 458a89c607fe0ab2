"""The feed-forward of a decoder layer, for some rows at a time: what the schedule asks of one, and the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qlora_hal_backends.torch_family.fused.layer_weights import AdapterGradients, LayerBuffers, LayerWeights
from qlora_hal_backends.torch_family.fused.operations import Dropout, Operations
from qlora_hal_backends.torch_family.fused.stream import GradientRoom, Stream
from qlora_hal_backends.torch_family.fused.tape import FeedForwardProducts, StreamGradient


class FeedForward(Protocol):
    """One object serves all layers of a model that have its kind, as the schedule does."""

    @property
    def tile_rows(self) -> int:
        """How many rows go through it at a time where its products are not kept."""
        ...

    @property
    def gradient_room(self) -> GradientRoom:
        """For the gradient of its output."""
        ...

    def hold(self, layer: LayerWeights) -> None:
        """From here on its products are of this layer. What `LayerBuffers` holds is there already."""
        ...

    def forget_adapter(self) -> None:
        """The adapter was updated, or may have been."""
        ...

    def inner(
        self,
        layer: LayerWeights,
        h1: Tensor,
        branch: Tensor | None,
        dropout: Dropout | None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, FeedForwardProducts]:
        """(h2, what is made of its norm before the activation). Without `branch`, `h1` is h2 already."""
        ...

    def outer(
        self, layer: LayerWeights, products: FeedForwardProducts, dropout: Dropout | None, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, in `into` where given; its low-rank inputs)."""
        ...

    def rows_backward(
        self,
        layer: LayerWeights,
        h2: Tensor,
        products: FeedForwardProducts,
        above: StreamGradient,
        middle: StreamGradient,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> None:
        """From the gradient of the output `above` to that of h2, into `middle`."""
        ...


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    """Gate and up are one product, of the group `into`; down is that of the group `out`."""

    buffers: LayerBuffers
    operations: Operations
    stream: Stream
    tile_rows: int
    into: str = "feed_forward_in"
    out: str = "feed_forward_out"

    @property
    def gradient_room(self) -> GradientRoom:
        return self.buffers.groups[self.out]

    def hold(self, layer: LayerWeights) -> None:
        pass

    def forget_adapter(self) -> None:
        pass

    def inner(
        self,
        layer: LayerWeights,
        h1: Tensor,
        branch: Tensor | None,
        dropout: Dropout | None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, FeedForwardProducts]:
        group = self.buffers.groups[self.into]
        extended = group.new_input(h1.shape[0])
        x = extended[:, : group.columns]
        h2 = self.operations.add_norm(h1, branch, layer.middle_norm, self.stream.epsilon, x, into)
        return h2, self.gate_up(layer, extended, dropout)

    def gate_up(self, layer: LayerWeights, extended: Tensor, dropout: Dropout | None) -> FeedForwardProducts:
        """Of an input made by the group, whose first K columns are filled."""
        group = self.buffers.groups[self.into]
        masks = layer.groups[self.into].masks(dropout)
        x = extended[:, : group.columns]
        low_rank = kept_apart(group.low_rank(x, extended[:, group.columns :], masks))
        products = group.new_gradient(extended.shape[0])
        group.product(extended, layer.groups[self.into].bias, products[:, : group.rows])
        return FeedForwardProducts(low_rank, products, None, None)

    def outer(
        self, layer: LayerWeights, products: FeedForwardProducts, dropout: Dropout | None, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        out = self.buffers.groups[self.out]
        extended = out.new_input(products.extended.shape[0])
        self.operations.swiglu(products.extended[:, : 2 * out.columns], extended[:, : out.columns])
        return self.down(layer, extended, dropout, into)

    def down(
        self, layer: LayerWeights, extended: Tensor, dropout: Dropout | None, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, its low-rank inputs) of an input made by the group, whose first K columns are filled."""
        out = self.buffers.groups[self.out]
        x = extended[:, : out.columns]
        masks = layer.groups[self.out].masks(dropout)
        low_rank = kept_apart(out.low_rank(x, extended[:, out.columns :], masks))
        return out.product(extended, layer.groups[self.out].bias, into), low_rank

    def rows_backward(
        self,
        layer: LayerWeights,
        h2: Tensor,
        products: FeedForwardProducts,
        above: StreamGradient,
        middle: StreamGradient,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> None:
        v, x_gradient = self.backward(layer, products, above.extended, dropout, gradients)
        x = self.stream.norm_backward_into(x_gradient, h2, layer.middle_norm, above, middle, wants_x=v is not None)
        of_in = layer.groups[self.into]
        gradients.of_a(of_in, v, x, of_in.masks(dropout))

    def backward(
        self,
        layer: LayerWeights,
        products: FeedForwardProducts,
        output_gradient: Tensor,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> tuple[Tensor | None, Tensor]:
        """(v of the first group, the gradient of x)."""
        v, product = self.product_gradient(layer, output_gradient, dropout)
        gate_up = products.extended[:, : self.buffers.groups[self.into].rows]
        # In place: the product takes the place of its gradient, the gradients of gate and up that of gate and up.
        self.operations.swiglu_backward(gate_up, product, gate_up, product)
        return self.input_gradient(layer, products, v, product, output_gradient, dropout, gradients)

    def product_gradient(
        self, layer: LayerWeights, output_gradient: Tensor, dropout: Dropout | None
    ) -> tuple[Tensor | None, Tensor]:
        """(v of the last group, the gradient of the gated product)."""
        out, masks = self.buffers.groups[self.out], layer.groups[self.out].masks(dropout)
        v = out.low_rank_gradient(output_gradient, masks)
        return v, out.input_gradient(output_gradient, masks)

    def input_gradient(
        self,
        layer: LayerWeights,
        products: FeedForwardProducts,
        v: Tensor | None,
        product: Tensor,
        output_gradient: Tensor,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> tuple[Tensor | None, Tensor]:
        """(v of the first group, the gradient of x), where `products` hold the gradients of gate and up, `product` the
        gated product again, and `v` is that of the last group."""
        into, out = self.buffers.groups[self.into], self.buffers.groups[self.out]
        of_in, of_out = layer.groups[self.into], layer.groups[self.out]
        in_masks, out_masks = of_in.masks(dropout), of_out.masks(dropout)
        extended, low_rank = products.extended, products.output_low_rank
        if low_rank is None:
            low_rank = out.low_rank(product, masks=out_masks)
        gradients.of_b(of_out, output_gradient, low_rank)
        gradients.of_a(of_out, v, product, out_masks)
        v = into.low_rank_gradient(extended, in_masks)
        x_gradient = into.input_gradient(extended, in_masks)
        gradients.of_b(of_in, extended, products.input_low_rank)
        return v, x_gradient


def kept_apart(tail: Tensor | None) -> Tensor | None:
    """A copy of the thin tail, so that the wide buffer behind it can be freed."""
    return None if tail is None else tail.clone()
