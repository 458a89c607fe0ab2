"""The expert that every token goes to, beside the routed ones: a dense feed-forward whose output is multiplied with
sigmoid(x g), where a family has such a gate. As with a routing weight, that rides in the gated product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.fused.feed_forward import DenseFeedForward
from qlora_hal_backends.torch_family.fused.layer_weights import AdapterGradients, LayerWeights
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations
from qlora_hal_backends.torch_family.fused.operations import Dropout
from qlora_hal_backends.torch_family.fused.tape import SharedProducts


@dataclass(frozen=True, slots=True)
class SharedExpert:
    dense: DenseFeedForward
    mixture: MixtureOperations

    def new_input(self, rows: int) -> Tensor:
        return self.dense.buffers.groups["feed_forward_in"].new_input(rows)

    def inner(self, layer: LayerWeights, extended: Tensor, gate: Tensor, dropout: Dropout | None) -> SharedProducts:
        """Of an input made by the group, whose first columns are x. `gate` is g, `[1, D]`."""
        products = self.dense.gate_up(layer, extended, dropout)
        weights = torch.sigmoid(extended[:, : gate.shape[1]] @ gate.t())
        return SharedProducts(products, weights, torch.arange(len(extended), device=extended.device))

    def outer(self, layer: LayerWeights, shared: SharedProducts, dropout: Dropout | None) -> Tensor:
        out = self.dense.buffers.groups["feed_forward_out"]
        extended = out.new_input(len(shared.weights))
        gate_up = shared.products.extended[:, : 2 * out.columns]
        self.mixture.weighted_swiglu(gate_up, shared.weights, shared.places, extended[:, : out.columns])
        output, shared.products.output_low_rank = self.dense.down(layer, extended, dropout)
        return output

    def backward(
        self,
        layer: LayerWeights,
        shared: SharedProducts,
        output_gradient: Tensor,
        gate: Tensor,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> tuple[Tensor | None, Tensor]:
        """(v of gate and up, the gradient of x)."""
        v, product = self.dense.product_gradient(layer, output_gradient, dropout)
        gate_up = shared.products.extended[:, : 2 * product.shape[1]]
        weight_gradient = torch.empty(shared.weights.shape, dtype=torch.float32, device=product.device)
        self.mixture.weighted_swiglu_backward(
            gate_up, product, shared.weights, shared.places, gate_up, product, weight_gradient
        )
        v, x_gradient = self.dense.input_gradient(
            layer, shared.products, v, product, output_gradient, dropout, gradients
        )
        logit_gradient = torch.ops.aten.sigmoid_backward(weight_gradient, shared.weights.float())
        return v, torch.addmm(x_gradient, logit_gradient.to(gate.dtype), gate)
