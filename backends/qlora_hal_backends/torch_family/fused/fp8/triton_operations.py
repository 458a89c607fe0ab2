"""Products in 8-bit floats on a GPU: shapes, strides and tiles for the Triton kernels. Importing it needs Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_hal_backends.torch_family.base_weights import BaseWeight, Blockwise4BitWeight
from qlora_hal_backends.torch_family.fused.fp8 import kernels
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, LowRank, ScaledRows
from qlora_hal_backends.torch_family.fused.fp8.reference import ReferenceFp8
from qlora_hal_backends.torch_family.layer_slots import at_hand

DECODED_ROWS, DECODED_COLUMNS = 64, 64
"""A tile of a decoded weight; 64 is the smallest block of a 4-bit format."""

SCANNED_ELEMENTS = 2048
ROW_ELEMENTS_PER_WARP = 1024
SMALLEST_DOT, LARGEST_RANKS = 16, 64
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut, and how many programs are on a multiprocessor at a time. `exact` and `parts`: see
    `kernels.product`."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 1
    resident: int = 1
    exact: bool = False
    joined: bool = False


HOPPER = Tiles(128, 256, 128, warps=8, stages=3, parts=2)
"""Of twelve the fastest on an H200 (docs/runs/h200_fp8.json): 1301 and 1466 TFLOP/s on the shortest and the longest sum
of an 8B shape's layers, 1284 and 1348 joined, 943 and 998 with exact sums."""

BLACKWELL = Tiles(128, 128, 128, warps=8, stages=3, parts=2)
"""Of compute capability 10. Triton 3.7 makes an empty kernel of joined loops there."""

ADA = Tiles(128, 128, 64, warps=8, stages=2, parts=2)
"""Of compute capability 8.9 and 12, with 100 KB of shared memory."""

INTERPRETED = Tiles(32, 64, 64, warps=1, stages=1)


def tiles_for(device: torch.device) -> Tiles:
    if device.type != "cuda":
        return INTERPRETED
    return {9: HOPPER, 10: BLACKWELL}.get(torch.cuda.get_device_capability(device)[0], ADA)


class TritonFp8:
    """See `operations.Fp8Operations`. `tiles` are the device's unless given."""

    def __init__(self, tiles: Tiles | None = None) -> None:
        self._tiles = tiles
        self._torch = ReferenceFp8()

    def row_scales(self, base: BaseWeight, out: Tensor) -> None:
        base = at_hand(base)
        if not _has_whole_blocks(base):
            self._torch.row_scales(base, out)
            return
        rows, columns = base.shape
        block = base.state.blocksize
        kernels.row_scales[(rows,)](
            *_parts(base),
            out,
            columns,
            BLOCK=block,
            BLOCKS=max(1, SCANNED_ELEMENTS // block),
            **_nesting(base),
            num_warps=4,
            enable_fp_fusion=False,
        )

    def decode(self, base: BaseWeight, scales: Tensor, out: Tensor) -> None:
        base = at_hand(base)
        if not _has_whole_blocks(base):
            self._torch.decode(base, scales, out)
            return
        rows, columns = base.shape
        kernels.decode[(triton.cdiv(rows, DECODED_ROWS), columns // DECODED_COLUMNS)](
            *_parts(base),
            scales,
            out,
            out.stride(0),
            out.stride(1),
            rows,
            columns,
            BLOCK=base.state.blocksize,
            ROWS=DECODED_ROWS,
            WIDTH=DECODED_COLUMNS,
            TRANSPOSED=out.stride(1) != 1,
            **_nesting(base),
            num_warps=4,
            # As `dequantize`: bitsandbytes rounds the product of the nested scale before it adds the offset.
            enable_fp_fusion=False,
        )

    def quantize_rows(self, x: Tensor, column_scales: Tensor | None) -> ScaledRows:
        rows, columns = x.shape
        found = ScaledRows(
            torch.empty(rows, columns, dtype=E4M3, device=x.device),
            torch.empty(rows, dtype=torch.float32, device=x.device),
        )
        width = triton.next_power_of_2(columns)
        kernels.quantize_rows[(rows,)](
            x,
            x.stride(0),
            x if column_scales is None else column_scales,
            found.values,
            columns,
            found.scales,
            columns,
            SCALED=column_scales is not None,
            WIDTH=width,
            num_warps=min(16, max(1, width // ROW_ELEMENTS_PER_WARP)),
        )
        return found

    def product(
        self,
        left: ScaledRows,
        right: Tensor,
        column_scales: Tensor | None,
        low_rank: LowRank | None,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        (rows, inner), columns = left.values.shape, right.shape[0]
        tiles = self._tiles or tiles_for(out.device)
        ranks = 0 if low_rank is None else low_rank.left.shape[1]
        rank_block = min(LARGEST_RANKS, max(SMALLEST_DOT, triton.next_power_of_2(ranks)))
        by_rank = low_rank is not None and low_rank.right.stride(1) != 1
        described = TensorDescriptor.from_tensor
        values = described(left.values, [tiles.rows, tiles.inner])
        low_left = low_right = values  # not read without a low rank
        if low_rank is not None:
            low_left = described(low_rank.left, [tiles.rows, rank_block])
            if by_rank:
                low_right = described(low_rank.right.t(), [rank_block, tiles.columns])
            else:
                low_right = described(low_rank.right, [tiles.columns, rank_block])
        count = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
        kernels.product[(min(count, tiles.resident * _multiprocessors(out.device)),)](
            values,
            described(right, [tiles.columns, tiles.inner]),
            left.scales,
            left.scales if column_scales is None else column_scales,
            low_left,
            low_right,
            left.scales if bias is None else bias,
            described(out, [tiles.rows, tiles.columns // tiles.parts]),
            rows,
            columns,
            inner,
            BLOCK_ROWS=tiles.rows,
            BLOCK_COLUMNS=tiles.columns,
            BLOCK_INNER=tiles.inner,
            BLOCK_RANKS=rank_block,
            GROUP=tiles.group,
            COLUMN_SCALED=column_scales is not None,
            RANK_BLOCKS=triton.cdiv(ranks, rank_block),
            BY_RANK=by_rank,
            BIAS=bias is not None,
            EXACT_SUM=tiles.exact,
            PARTS=tiles.parts,
            # A tile of float32 on its way out leaves no room for the next one's operands.
            JOINED=tiles.joined and out.dtype != torch.float32,
            DTYPE=TYPES[out.dtype],
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _has_whole_blocks(base: BaseWeight) -> TypeGuard[Blockwise4BitWeight]:
    return isinstance(base, Blockwise4BitWeight) and base.shape[1] % base.state.blocksize == 0


def _parts(base: Blockwise4BitWeight) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
    state, nested = base.state, base.state.state2
    if nested is None:
        return base.packed, state.absmax, state.absmax, state.absmax, 0.0, state.code
    return base.packed, state.absmax, nested.absmax, nested.code, base.host_offset, state.code


def _nesting(base: Blockwise4BitWeight) -> dict[str, int | bool]:
    nested = base.state.state2
    return {"NESTED": nested is not None, "NESTED_BLOCK": 1 if nested is None else nested.blocksize}


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
