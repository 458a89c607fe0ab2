"""Routed experts as `fused.feed_forward.FeedForward`.

    x = norm(h2)                      x_e: the rows of x that the router sends to expert e
    y_e = (w_e silu(x_e G_e^T) x_e U_e^T) D_e^T            output of a token: the sum of its rows of y

and of what the shared expert makes of it, where there is one. A token's weight w_e belongs behind the last product; as
that is linear, it rides in the gated product before it. There its gradient is a sum over the experts' width, and the
outputs of experts are neither kept nor computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.fused.layer_weights import AdapterGradients, LayerWeights
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations, Routed, Router
from qlora_hal_backends.torch_family.fused.mixture.shared import SharedExpert
from qlora_hal_backends.torch_family.fused.mixture.weights import MixtureWeights, StackBuffers
from qlora_hal_backends.torch_family.fused.operations import Dropout, Operations
from qlora_hal_backends.torch_family.fused.stream import GradientRoom, Stream
from qlora_hal_backends.torch_family.fused.tape import FeedForwardProducts, StreamGradient
from qlora_hal_backends.torch_family.lora_linear import product_in_float32


@dataclass(frozen=True, slots=True)
class HiddenRoom:
    """`GradientRoom` of what reads a gradient as it is. `like` has the dtype."""

    rows: int
    like: Tensor

    def new_gradient(self, rows: int) -> Tensor:
        return self.like.new_empty(rows, self.rows)


@dataclass(frozen=True, slots=True)
class MixtureFeedForward:
    router: Router
    buffers: StackBuffers
    operations: Operations
    mixture: MixtureOperations
    stream: Stream
    tile_rows: int
    gradient_room: GradientRoom
    shared: SharedExpert | None

    def hold(self, layer: LayerWeights) -> None:
        self.buffers.hold(_experts_of(layer))

    def forget_adapter(self) -> None:
        self.buffers.forget_adapter()

    def inner(
        self,
        layer: LayerWeights,
        h1: Tensor,
        branch: Tensor | None,
        dropout: Dropout | None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, FeedForwardProducts]:
        group, experts = self.buffers.into, _experts_of(layer)
        x_extended = self._new_x(h1.shape[0])
        x = x_extended[:, : group.columns]
        h2 = self.operations.add_norm(h1, branch, layer.middle_norm, self.stream.epsilon, x, into)
        shared = None
        if self.shared is not None:
            shared = self.shared.inner(layer, x_extended, experts.shared_gate, dropout)
        routed = self._routed(experts, x)
        extended = group.new_input(routed.rows)
        rows = extended[:, : group.columns]
        self.mixture.send(x, routed.back, rows)
        low_rank = group.low_rank(rows, routed.ends, extended[:, group.columns :])
        gate_up = group.product(extended, routed.ends)
        return h2, FeedForwardProducts(low_rank, gate_up, None, None, routed, shared)

    def outer(
        self, layer: LayerWeights, products: FeedForwardProducts, dropout: Dropout | None, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        routed, group = _routed_of(products), self.buffers.out
        extended = group.new_input(routed.rows)
        product = extended[:, : group.columns]
        self.mixture.weighted_swiglu(products.extended, routed.weights, routed.order, product)
        low_rank = group.low_rank(product, routed.ends, extended[:, group.columns :])
        y = group.product(extended, routed.ends)
        output = self._hidden(len(routed.logits)) if into is None else into
        of_all = None
        if self.shared is not None and products.shared is not None:
            of_all = self.shared.outer(layer, products.shared, dropout)
        self.mixture.collect(y, routed.back, of_all, output)
        return output, low_rank

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
        experts, routed = _experts_of(layer), _routed_of(products)
        gate_up, weight_gradient = self._through_experts(experts, routed, products, above.extended)
        v = self.buffers.into.low_rank_gradient(gate_up, routed.ends)
        rows = self.buffers.into.input_gradient(gate_up, routed.ends)
        of_b = (gate_up[:, : self.buffers.into.rows], products.input_low_rank)
        self.buffers.into.add_gradients(experts.into, routed.ends, of_b=of_b)
        shared_v, of_x = None, self._through_router(experts, routed, weight_gradient)
        if self.shared is not None and products.shared is not None:
            shared_v, of_shared = self.shared.backward(
                layer, products.shared, above.extended, experts.shared_gate, dropout, gradients
            )
            of_x = of_x.add_(of_shared)
        x_gradient = self._hidden(h2.shape[0])
        self.mixture.collect(rows, routed.back, of_x, x_gradient)
        wants_x = v is not None or shared_v is not None
        x = self.stream.norm_backward_into(x_gradient, h2, layer.middle_norm, above, middle, wants_x=wants_x)
        if shared_v is not None:
            group = layer.groups["shared_in"]
            gradients.of_a(group, shared_v, x, group.masks(dropout))
        if v is not None:
            self.mixture.send(x, routed.back, rows)
            self.buffers.into.add_gradients(experts.into, routed.ends, of_a=(v, rows))

    def _through_experts(
        self, experts: MixtureWeights, routed: Routed, products: FeedForwardProducts, output_gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up, with room for v beside them, and of the routing weights, float32 `[M, k]`."""
        into, out = self.buffers.into, self.buffers.out
        extended = out.new_gradient(routed.rows)
        self.mixture.send(output_gradient[:, : out.rows], routed.back, extended[:, : out.rows])
        v = out.low_rank_gradient(extended, routed.ends)
        product = out.input_gradient(extended, routed.ends)
        # Without ranks there is no room to make beside it: the gradient takes the place of gate and up.
        gate_up = into.new_gradient(routed.rows) if into.ranks else products.extended
        weight_gradient = torch.empty(routed.weights.shape, dtype=torch.float32, device=product.device)
        # The product takes the place of its gradient.
        self.mixture.weighted_swiglu_backward(
            products.extended, product, routed.weights, routed.order, gate_up[:, : into.rows], product, weight_gradient
        )
        products.extended = product.new_empty(0)  # gate and up are not read again
        low_rank = products.output_low_rank
        if low_rank is None:
            low_rank = out.low_rank(product, routed.ends)
        out.add_gradients(experts.out, routed.ends, of_a=(v, product), of_b=(extended[:, : out.rows], low_rank))
        return gate_up, weight_gradient

    def _through_router(self, experts: MixtureWeights, routed: Routed, weight_gradient: Tensor) -> Tensor:
        """The gradient of x `[M, D]` by way of the routing weights; the choice itself has none."""
        logits_gradient = torch.empty_like(routed.logits, dtype=experts.router.dtype)
        self.mixture.route_backward(routed.logits, routed.experts, weight_gradient, self.router, logits_gradient)
        return logits_gradient @ experts.router

    def _new_x(self, rows: int) -> Tensor:
        """Uninitialized `[rows, D]`, with the columns that the shared expert wants behind."""
        return self._hidden(rows) if self.shared is None else self.shared.new_input(rows)

    def _hidden(self, rows: int) -> Tensor:
        """Uninitialized `[rows, D]`."""
        return self.buffers.into.memory.new_empty(rows, self.buffers.into.columns)

    def _routed(self, experts: MixtureWeights, x: Tensor) -> Routed:
        multiply = product_in_float32 if self.router.exact_logits else torch.matmul
        logits = multiply(x, experts.router.t())
        weights, chosen = self.mixture.route(logits, experts.correction, self.router)
        return Routed(logits, chosen, weights, *self.mixture.sort(chosen, logits.shape[1]))


def _experts_of(layer: LayerWeights) -> MixtureWeights:
    assert layer.experts is not None, "a layer without experts has a dense feed-forward"
    return layer.experts


def _routed_of(products: FeedForwardProducts) -> Routed:
    assert products.routed is not None, "made by `inner`"
    return products.routed
