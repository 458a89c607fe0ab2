"""The expert that every token goes to, beside the routed ones: a dense feed-forward whose output is multiplied with
sigmoid(x g), where a family has such a gate g. As with a routing weight, that rides in the gated product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.fused.feed_forward import DenseFeedForward
from qlora_hal_backends.torch_family.fused.layer_weights import AdapterGradients, LayerWeights
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations
from qlora_hal_backends.torch_family.fused.operations import Dropout
from qlora_hal_backends.torch_family.fused.tape import GateWeights, SharedProducts


@dataclass(frozen=True, slots=True)
class SharedExpert:
    dense: DenseFeedForward
    mixture: MixtureOperations

    def new_input(self, rows: int) -> Tensor:
        return self.dense.buffers.groups[self.dense.into].new_input(rows)

    def inner(
        self, layer: LayerWeights, extended: Tensor, gate: Tensor | None, dropout: Dropout | None
    ) -> SharedProducts:
        """Of an input made by the group, whose first columns are x. `gate` is g, `[1, D]`."""
        products = self.dense.gate_up(layer, extended, dropout)
        if gate is None:
            return SharedProducts(products, None)
        weights = torch.sigmoid(extended[:, : gate.shape[1]] @ gate.t())
        return SharedProducts(products, GateWeights(weights, torch.arange(len(extended), device=extended.device)))

    def outer(self, layer: LayerWeights, shared: SharedProducts, dropout: Dropout | None) -> Tensor:
        products, gate = shared.products, shared.gate
        if gate is None:
            output, products.output_low_rank = self.dense.outer(layer, products, dropout)
            return output
        out = self.dense.buffers.groups[self.dense.out]
        extended = out.new_input(len(gate.weights))
        gate_up = products.extended[:, : 2 * out.columns]
        self.mixture.weighted_swiglu(gate_up, gate.weights, gate.places, extended[:, : out.columns])
        output, products.output_low_rank = self.dense.down(layer, extended, dropout)
        return output

    def backward(
        self,
        layer: LayerWeights,
        shared: SharedProducts,
        output_gradient: Tensor,
        gate: Tensor | None,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> tuple[Tensor | None, Tensor]:
        """(v of gate and up, the gradient of x)."""
        if gate is None or shared.gate is None:
            return self.dense.backward(layer, shared.products, output_gradient, dropout, gradients)
        weights, places = shared.gate.weights, shared.gate.places
        v, product = self.dense.product_gradient(layer, output_gradient, dropout)
        gate_up = shared.products.extended[:, : 2 * product.shape[1]]
        weight_gradient = torch.empty(weights.shape, dtype=torch.float32, device=product.device)
        self.mixture.weighted_swiglu_backward(gate_up, product, weights, places, gate_up, product, weight_gradient)
        v, x_gradient = self.dense.input_gradient(
            layer, shared.products, v, product, output_gradient, dropout, gradients
        )
        logit_gradient = torch.ops.aten.sigmoid_backward(weight_gradient, weights.float())
        return v, torch.addmm(x_gradient, logit_gradient.to(gate.dtype), gate)
