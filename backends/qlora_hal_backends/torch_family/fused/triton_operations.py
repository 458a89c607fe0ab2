"""The operations of the fused step on a GPU: shapes and strides for the Triton kernels. Importing it needs Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_hal.contract.dropout import drop_below
from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.base_weights import BaseWeight, Blockwise4BitWeight
from qlora_hal_backends.torch_family.fused import kernels
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.operations import HeadNorm, Masks, Placements, Rotary
from qlora_hal_backends.torch_family.layer_slots import at_hand

HEADS_PER_PROGRAM = 8
SWIGLU_COLUMNS = 2048
COPIED_COLUMNS = 4096
DROPPED_COLUMNS = 2048
SMALLEST_DOT = 16
VOCABULARY_COLUMNS = 8192
DEQUANTIZED_ELEMENTS = 2048  # with two warps the fastest of 1024-8192 elements and 2-16 warps on an H200
DEQUANTIZE_WARPS = 2
PLACED_ELEMENTS = 4096
NORM_ELEMENTS_PER_WARP = 512


def cdiv(elements: int, of_a_program: int) -> int:
    """How many programs; Triton's own takes longer on the host than a torch operation."""
    return -(-elements // of_a_program)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


class TritonOperations:
    """See `operations.Operations`."""

    def __init__(self, activation: Activation = Activation.SILU) -> None:
        self.activation = activation

    def dequantize(self, base: BaseWeight, out: Tensor) -> None:
        base = at_hand(base)
        if not isinstance(base, Blockwise4BitWeight) or base.shape[1] % base.state.blocksize:
            out.copy_(base.dense())
            return
        state = base.state
        nested = state.state2
        block_count = base.shape[0] * base.shape[1] // state.blocksize
        blocks = max(1, DEQUANTIZED_ELEMENTS // state.blocksize)
        kernels.dequantize[(cdiv(block_count, blocks),)](
            base.packed,
            state.absmax,
            nested.absmax if nested is not None else state.absmax,
            nested.code if nested is not None else state.code,
            base.host_offset if nested is not None else 0.0,
            state.code,
            out,
            base.shape[1],
            out.stride(0),
            block_count,
            BLOCK=state.blocksize,
            BLOCKS=blocks,
            NESTED_BLOCK=nested.blocksize if nested is not None else 1,
            NESTED=nested is not None,
            num_warps=DEQUANTIZE_WARPS,
            # bitsandbytes rounds the product of the nested scale before it adds the offset; fused they differ.
            enable_fp_fusion=False,
        )

    def place(self, source: Tensor, target: Tensor, placements: Placements) -> None:
        if placements.entries:
            grid = (len(placements.entries), cdiv(placements.largest, PLACED_ELEMENTS))
            kernels.place[grid](source, target, placements.table, ELEMENTS=PLACED_ELEMENTS, num_warps=4)

    def copy_rows(self, source: Tensor, out: Tensor) -> None:
        rows, width = out.shape
        block = min(COPIED_COLUMNS, next_power_of_2(width))
        kernels.copy_rows[(rows, cdiv(width, block))](
            source, source.stride(0), out, out.stride(0), width, WIDTH=block, num_warps=4
        )

    def add_norm(
        self,
        residual: Tensor,
        pending: Tensor | None,
        weight: Tensor,
        epsilon: float,
        out: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        rows, width = residual.shape
        if pending is None:
            into = residual
        h = torch.empty_like(residual) if into is None else into
        kernels.add_norm[(rows,)](
            residual,
            residual.stride(0),
            residual if pending is None else pending,
            h,
            weight,
            out,
            out.stride(0),
            epsilon,
            D=width,
            PENDING=pending is not None,
            **_row_shape(width),
        )
        return h

    def norm_backward(
        self,
        gradient: Tensor,
        h: Tensor,
        weight: Tensor,
        epsilon: float,
        residual_gradient: Tensor | None,
        out: Tensor,
        out_exact: Tensor | None,
        normed: Tensor | None,
    ) -> None:
        rows, width = h.shape
        upstream = gradient if residual_gradient is None else residual_gradient
        kernels.norm_backward[(rows,)](
            gradient,
            gradient.stride(0),
            h,
            h.stride(0),
            weight,
            upstream,
            upstream.stride(0),
            out,
            out.stride(0),
            out if out_exact is None else out_exact,
            out if normed is None else normed,
            epsilon,
            D=width,
            RESIDUAL=residual_gradient is not None,
            EXACT=out_exact is not None,
            NORMED=normed is not None,
            **_row_shape(width),
        )

    def swiglu(self, gate_up: Tensor, out: Tensor) -> None:
        rows, width = out.shape
        block = min(SWIGLU_COLUMNS, next_power_of_2(width))
        kernels.swiglu[(rows, cdiv(width, block))](
            gate_up,
            gate_up.stride(0),
            out,
            width,
            out.stride(0),
            GELU=self.activation is Activation.GELU_TANH,
            WIDTH=block,
            num_warps=4,
        )

    def swiglu_backward(self, gate_up: Tensor, gradient: Tensor, out: Tensor, product: Tensor) -> None:
        rows, width = product.shape
        block = min(SWIGLU_COLUMNS, next_power_of_2(width))
        kernels.swiglu_backward[(rows, cdiv(width, block))](
            gate_up,
            gate_up.stride(0),
            gradient,
            out,
            product,
            width,
            out.stride(0),
            GELU=self.activation is Activation.GELU_TANH,
            WIDTH=block,
            num_warps=4,
        )

    def rotate(self, source: Tensor, out: Tensor, heads: HeadCounts, rotary: Rotary, norm: HeadNorm | None) -> None:
        count = heads.query + heads.key_value
        kernels.rotate[(source.shape[0], cdiv(count, HEADS_PER_PROGRAM))](
            source,
            source.stride(0),
            out,
            out.stride(0),
            rotary.cos,
            rotary.sin,
            rotary.positions,
            rotary.cos if norm is None else norm.weights,
            0.0 if norm is None else norm.epsilon,
            count,
            heads.query,
            HALF=heads.size // 2,
            TURNED=rotary.pairs,
            NORM=norm is not None,
            HEADS=HEADS_PER_PROGRAM,
            WIDTH=next_power_of_2(heads.size // 2),
            num_warps=4,
        )

    def rotate_backward(
        self,
        gradient: Tensor,
        out: Tensor,
        rotary: Rotary,
        norm: HeadNorm | None,
        source: Tensor,
        is_key: bool,
    ) -> None:
        _, count, time, size = gradient.shape
        if gradient.stride(3) != 1:
            gradient = gradient.contiguous()
        kernels.rotate_backward[(out.shape[0], cdiv(count, HEADS_PER_PROGRAM))](
            gradient,
            gradient.stride(0),
            gradient.stride(1),
            gradient.stride(2),
            time,
            out,
            out.stride(0),
            source,
            source.stride(0),
            rotary.cos,
            rotary.sin,
            rotary.positions,
            rotary.cos if norm is None else norm.weights[int(is_key)],
            0.0 if norm is None else norm.epsilon,
            count,
            HALF=size // 2,
            TURNED=rotary.pairs,
            NORM=norm is not None,
            HEADS=HEADS_PER_PROGRAM,
            WIDTH=next_power_of_2(size // 2),
            num_warps=4,
        )

    def drop(self, x: Tensor, masks: Masks, number: int, out: Tensor) -> None:
        rows, width = x.shape
        block = min(DROPPED_COLUMNS, next_power_of_2(width))
        kernels.drop[(rows, cdiv(width, block))](
            x,
            x.stride(0),
            masks.dropout.tokens,
            masks.channels[number],
            out,
            out.stride(0),
            width,
            drop_below(masks.dropout.rate),
            WIDTH=block,
            num_warps=4,
        )

    def add_dropped(self, product: Tensor, v: Tensor, a: Tensor, masks: Masks, out: Tensor) -> None:
        rows, width = product.shape
        padded = max(SMALLEST_DOT, next_power_of_2(masks.rank))
        tile = {"ROWS": 64, "WIDTH": 128} if padded <= 64 else {"ROWS": 32, "WIDTH": 32}
        kernels.add_dropped[(cdiv(rows, tile["ROWS"]), cdiv(width, tile["WIDTH"]))](
            product,
            v,
            v.stride(0),
            a,
            a.stride(0),
            masks.dropout.tokens,
            masks.channels,
            out,
            out.stride(0),
            rows,
            width,
            drop_below(masks.dropout.rate),
            RANK=masks.rank,
            PADDED=padded,
            PROJECTIONS=masks.channels.shape[0],
            **tile,
            num_warps=4,
        )

    def cross_entropy(self, logits: Tensor, targets: Tensor, scale: float, with_gradient: bool) -> Tensor:
        rows, vocabulary = logits.shape
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        width = min(VOCABULARY_COLUMNS, next_power_of_2(vocabulary))
        kernels.cross_entropy[(rows,)](
            logits, targets, losses, vocabulary, scale, GRADIENT=with_gradient, WIDTH=width, num_warps=16
        )
        return losses


def _row_shape(width: int) -> dict[str, int]:
    """One program a row; a warp for each few hundred elements."""
    padded = next_power_of_2(width)
    return {"WIDTH": padded, "num_warps": min(16, max(1, padded // NORM_ELEMENTS_PER_WARP))}
