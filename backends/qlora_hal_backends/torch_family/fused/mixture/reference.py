"""The operations of a mixture in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.mixture.operations import Router
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations


class ReferenceMixture:
    """See `operations.MixtureOperations`."""

    def __init__(self, activation: Activation = Activation.SILU) -> None:
        self.activation = activation
        self._dense = ReferenceOperations(activation)

    def dequantize_stack(self, base: StackedWeight, out: Tensor) -> None:
        out.copy_(base.dense())

    def route(self, logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        probabilities, experts = torch.sort(_softmax(logits), dim=-1, descending=True, stable=True)
        weights = probabilities[:, : router.each]
        if router.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(router.dtype), experts[:, : router.each].to(torch.int16)

    def route_backward(self, logits: Tensor, experts: Tensor, gradient: Tensor, router: Router, out: Tensor) -> None:
        probabilities, chosen = _softmax(logits), experts.long()
        weights = probabilities.gather(1, chosen)
        # Of softmax, the gradient is p (g - sum p g); of the best by their sum it is the same with their shares.
        if router.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
            probabilities = torch.zeros_like(probabilities).scatter_(1, chosen, weights)
        of_all = torch.zeros_like(probabilities).scatter_(1, chosen, gradient)
        out.copy_(probabilities * (of_all - (weights * gradient).sum(dim=-1, keepdim=True)))

    def sort(self, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        found, order = torch.sort(chosen.view(-1), stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(experts, dtype=chosen.dtype, device=chosen.device)
        # Not bincount, which does wait.
        return order, back, torch.searchsorted(found, numbers, right=True, out_int32=True)

    def send(self, tokens: Tensor, back: Tensor, out: Tensor) -> None:
        out[back] = tokens.repeat_interleave(len(back) // len(tokens), dim=0)

    def scale(self, thin: Tensor, factor: float, copy: Tensor) -> None:
        copy.copy_(thin.mul_(factor))

    def collect(self, rows: Tensor, back: Tensor, addend: Tensor | None, out: Tensor) -> None:
        total = rows[back].float().unflatten(0, (out.shape[0], -1)).sum(dim=1)
        out.copy_(total if addend is None else total + addend.float())

    def weighted_swiglu(self, gate_up: Tensor, weights: Tensor, order: Tensor, out: Tensor) -> None:
        product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        self._dense.swiglu(gate_up, product)
        out.copy_(product * _of_rows(weights, order))

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
        of_rows, upstream = _of_rows(weights, order), gradient.float()
        exact = torch.empty(product.shape, dtype=torch.float32, device=product.device)
        self._dense.swiglu_backward(gate_up, upstream * of_rows, out, exact)
        weight_gradient.view(-1)[order] = (upstream * exact).sum(dim=-1)
        product.copy_(exact * of_rows)

    def add_to_experts(self, gradient: Tensor, products: Tensor, ends: Tensor) -> None:
        has_rows = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        gradient += torch.where(has_rows[:, None, None], products.float(), 0.0)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits.float(), dim=-1)


def _of_rows(weights: Tensor, order: Tensor) -> Tensor:
    return weights.reshape(-1)[order].float()[:, None]
