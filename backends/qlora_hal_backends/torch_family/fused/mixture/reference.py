"""The operations of a mixture in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.mixture.operations import Router, Scores
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations


class ReferenceMixture:
    """See `operations.MixtureOperations`."""

    def __init__(self, activation: Activation = Activation.SILU) -> None:
        self.activation = activation
        self._dense = ReferenceOperations(activation)

    def dequantize_stack(self, base: StackedWeight, out: Tensor) -> None:
        out.copy_(base.dense())

    def route(self, logits: Tensor, correction: Tensor | None, router: Router) -> tuple[Tensor, Tensor]:
        scores = _scores(logits, router)
        corrected = _in_the_best_groups(scores if correction is None else scores + correction, router)
        chosen = _best(corrected, router.each)
        weights = scores.gather(1, chosen)
        if router.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * router.factor).to(router.dtype), chosen.to(torch.int16)

    def route_backward(self, logits: Tensor, experts: Tensor, gradient: Tensor, router: Router, out: Tensor) -> None:
        scores, chosen = _scores(logits, router), experts.long()
        of_scores = torch.zeros_like(scores).scatter_(1, chosen, gradient * router.factor)
        if router.normalizes:
            total = scores.gather(1, chosen).sum(dim=-1, keepdim=True)
            along = (scores * of_scores).sum(dim=-1, keepdim=True) / total
            of_scores.scatter_add_(1, chosen, -along.expand(chosen.shape)).div_(total)
        if router.scores is Scores.SIGMOID:
            out.copy_(of_scores * scores * (1.0 - scores))
        else:
            out.copy_(scores * (of_scores - (scores * of_scores).sum(dim=-1, keepdim=True)))

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


def _scores(logits: Tensor, router: Router) -> Tensor:
    exact = logits.float()
    return torch.sigmoid(exact) if router.scores is Scores.SIGMOID else torch.softmax(exact, dim=-1)


def _best(scores: Tensor, each: int) -> Tensor:
    """Their numbers, of equals the lower first."""
    numbers: Tensor = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return numbers[..., :each]


def _in_the_best_groups(scores: Tensor, router: Router) -> Tensor:
    """No score outside them is ever among the best."""
    if router.groups_kept == router.groups:
        return scores
    grouped: Tensor = scores.unflatten(-1, (router.groups, -1))
    two_best = grouped.gather(-1, _best(grouped, 2)).sum(dim=-1)
    outside = torch.ones_like(two_best, dtype=torch.bool).scatter_(-1, _best(two_best, router.groups_kept), False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(-2)


def _of_rows(weights: Tensor, order: Tensor) -> Tensor:
    return weights.reshape(-1)[order].float()[:, None]
