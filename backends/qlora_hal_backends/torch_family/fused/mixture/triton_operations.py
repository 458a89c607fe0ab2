"""The operations of a mixture on a GPU: shapes and strides for the Triton kernels. Importing it needs Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import Blockwise4BitStack, StackedWeight
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.mixture import kernels
from qlora_hal_backends.torch_family.fused.mixture.operations import Router, Scores
from qlora_hal_backends.torch_family.fused.triton_operations import (
    DEQUANTIZE_WARPS,
    DEQUANTIZED_ELEMENTS,
    cdiv,
    next_power_of_2,
)
from qlora_hal_backends.torch_family.layer_slots import at_hand

COLUMNS = 2048
"""Of one program, at most."""
SENT_COLUMNS = 1024
ADDED_ELEMENTS = 4096
SCALED_ELEMENTS = 2048
COUNTED_PAIRS = 8192
"""Pairs of a place and an expert that one program compares."""


class TritonMixture:
    """See `operations.MixtureOperations`."""

    def __init__(self, activation: Activation = Activation.SILU) -> None:
        self.activation = activation

    def dequantize_stack(self, base: StackedWeight, out: Tensor) -> None:
        base = at_hand(base)
        experts, rows, columns = base.shape
        if not isinstance(base, Blockwise4BitStack) or columns % base.like.blocksize:
            out.copy_(base.dense())
            return
        nested, offsets = base.nested, base.offsets
        size = base.like.blocksize
        blocks = max(1, DEQUANTIZED_ELEMENTS // size)
        kernels.dequantize_stack[(cdiv(rows * columns // size, blocks), experts)](
            base.packed,
            base.absmax,
            base.absmax if nested is None else nested,
            base.like.code if nested is None else base.like.state2.code,
            base.absmax if offsets is None else offsets,
            base.like.code,
            out,
            columns,
            out.stride(1),
            out.stride(0),
            rows * columns // size,
            0 if nested is None else nested.shape[1],
            BLOCK=size,
            BLOCKS=blocks,
            NESTED_BLOCK=1 if nested is None else base.like.state2.blocksize,
            NESTED=nested is not None,
            num_warps=DEQUANTIZE_WARPS,
            enable_fp_fusion=False,  # as in `fused.triton_operations`
        )

    def route(self, logits: Tensor, correction: Tensor | None, router: Router) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        weights = logits.new_empty(tokens, router.each, dtype=router.dtype)
        chosen = logits.new_empty(tokens, router.each, dtype=torch.int16)
        kernels.route[(tokens,)](
            logits,
            logits if correction is None else correction,
            weights,
            chosen,
            experts,
            router.factor,
            EACH=router.each,
            NORMALIZES=router.normalizes,
            SIGMOID=router.scores is Scores.SIGMOID,
            CORRECTED=correction is not None,
            GROUPS=router.groups,
            GROUPS_KEPT=router.groups_kept,
            GROUP_PLACES=next_power_of_2(router.groups),
            EXPERTS=next_power_of_2(experts),
            PLACES=next_power_of_2(router.each),
            num_warps=1,
        )
        return weights, chosen

    def route_backward(self, logits: Tensor, experts: Tensor, gradient: Tensor, router: Router, out: Tensor) -> None:
        kernels.route_backward[(logits.shape[0],)](
            logits,
            experts,
            gradient,
            out,
            logits.shape[1],
            router.factor,
            EACH=router.each,
            NORMALIZES=router.normalizes,
            SIGMOID=router.scores is Scores.SIGMOID,
            EXPERTS=next_power_of_2(logits.shape[1]),
            num_warps=1,
        )

    def sort(self, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        count, padded = chosen.numel(), next_power_of_2(experts)
        places = max(16, COUNTED_PAIRS // padded)
        blocks = cdiv(count, places)
        counts = torch.empty(experts * blocks, dtype=torch.int32, device=chosen.device)
        kernels.count_choices[(blocks,)](
            chosen, counts, count, blocks, experts, EXPERTS=padded, PLACES=places, num_warps=4
        )
        sums = torch.cumsum(counts, 0, dtype=torch.int32)
        order = torch.empty(count, dtype=torch.int64, device=chosen.device)
        back, ends = torch.empty_like(order), counts.new_empty(experts)
        kernels.place_choices[(blocks,)](
            chosen, counts, sums, order, back, ends, count, blocks, experts, EXPERTS=padded, PLACES=places, num_warps=4
        )
        return order, back, ends

    def send(self, tokens: Tensor, back: Tensor, out: Tensor) -> None:
        count, width = tokens.shape
        block = min(SENT_COLUMNS, next_power_of_2(width))
        kernels.send[(count, cdiv(width, block))](
            tokens,
            tokens.stride(0),
            back,
            out,
            out.stride(0),
            width,
            EACH=len(back) // count,
            WIDTH=block,
            num_warps=4,
        )

    def scale(self, thin: Tensor, factor: float, copy: Tensor) -> None:
        rows, ranks = thin.shape
        width = next_power_of_2(ranks)
        at_a_time = max(1, SCALED_ELEMENTS // width)
        kernels.scale[(cdiv(rows, at_a_time),)](
            thin, copy, copy.stride(0), factor, rows, RANKS=ranks, ROWS=at_a_time, WIDTH=width, num_warps=4
        )

    def collect(self, rows: Tensor, back: Tensor, addend: Tensor | None, out: Tensor) -> None:
        tokens, width = out.shape
        block = _block(width)
        kernels.collect[(tokens, cdiv(width, block))](
            rows,
            rows.stride(0),
            back,
            out if addend is None else addend,
            out,
            width,
            EACH=len(back) // tokens,
            ADDEND=addend is not None,
            WIDTH=block,
            num_warps=4,
        )

    def weighted_swiglu(self, gate_up: Tensor, weights: Tensor, order: Tensor, out: Tensor) -> None:
        rows, width = out.shape
        block = _block(width)
        kernels.weighted_swiglu[(rows, cdiv(width, block))](
            gate_up,
            gate_up.stride(0),
            weights,
            order,
            out,
            width,
            out.stride(0),
            GELU=self.activation is Activation.GELU_TANH,
            WIDTH=block,
            num_warps=4,
        )

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
        rows, width = product.shape
        kernels.weighted_swiglu_backward[(rows,)](
            gate_up,
            gate_up.stride(0),
            gradient,
            gradient.stride(0),
            weights,
            order,
            out,
            out.stride(0),
            product,
            product.stride(0),
            weight_gradient,
            width,
            GELU=self.activation is Activation.GELU_TANH,
            WIDTH=_block(width),
            num_warps=4,
        )

    def add_to_experts(self, gradient: Tensor, products: Tensor, ends: Tensor) -> None:
        experts, rows, columns = gradient.shape
        kernels.add_to_experts[(cdiv(rows * columns, ADDED_ELEMENTS), experts)](
            gradient,
            gradient.stride(0),
            products,
            products.stride(0),
            products.stride(1),
            ends,
            columns,
            rows * columns,
            ELEMENTS=ADDED_ELEMENTS,
            num_warps=4,
        )


def _block(width: int) -> int:
    return min(COLUMNS, next_power_of_2(width))
