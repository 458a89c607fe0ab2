# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Triton kernels of products in 8-bit floats; `triton_operations` launches them. Importing this module needs Triton.

Quotients are rounded to nearest (`div_rn`): an approximate one that falls on the other side of a boundary of E4M3 would
be another element. Every row index that is multiplied is 64-bit, as in `fused.kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_hal_backends.torch_family.fused.fp8.operations import LARGEST

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _scale_of(largest):
    return tl.where(largest > 0.0, tl.div_rn(largest, _LARGEST), 1.0)


@triton.jit
def _block_scale(
    block, absmax, nested_absmax, nested_code, offset, valid, NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr
):
    if NESTED:
        index = tl.load(absmax + block, mask=valid, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_absmax + block // NESTED_BLOCK, mask=valid, other=0.0)
        return scale + offset
    else:
        return tl.load(absmax + block, mask=valid, other=0.0)


@triton.jit
def row_scales(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    out,
    columns,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """One program a row. Each row holds a whole number of blocks (the caller sees to it)."""
    row = tl.program_id(0).to(tl.int64)
    of_row = columns // BLOCK
    within = tl.arange(0, BLOCK // 2)
    largest = 0.0
    for start in range(0, of_row, BLOCKS):
        place = start + tl.arange(0, BLOCKS)
        valid = place < of_row
        block = row * of_row + place
        scale = _block_scale(block, absmax, nested_absmax, nested_code, offset, valid, NESTED_BLOCK, NESTED)[:, None]
        pair = tl.load(packed + block[:, None] * (BLOCK // 2) + within[None, :], mask=valid[:, None], other=0)
        pair = pair.to(tl.int32)
        high = tl.abs(tl.load(code + (pair >> 4)) * scale)
        low = tl.abs(tl.load(code + (pair & 15)) * scale)
        both = tl.where(valid[:, None], tl.maximum(high, low), 0.0)
        largest = tl.maximum(largest, tl.max(tl.max(both, axis=1), axis=0))
    tl.store(out + row, _scale_of(largest))


@triton.jit
def decode(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    scales,
    out,
    row_stride,
    column_stride,
    rows,
    columns,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile of ROWS x WIDTH, which lies in one block of each row. TRANSPOSED, neighbours in `out` are rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = tl.program_id(1) * WIDTH
    valid = row < rows
    first = row * columns + start
    scale = _block_scale(first // BLOCK, absmax, nested_absmax, nested_code, offset, valid, NESTED_BLOCK, NESTED)
    within = tl.arange(0, WIDTH // 2)
    pair = tl.load(packed + (first // 2)[:, None] + within[None, :], mask=valid[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    row_scale = tl.load(scales + row, mask=valid, other=1.0)[:, None]
    value = tl.div_rn(tl.interleave(high, low), row_scale).to(tl.float8e4nv)
    column = start + tl.arange(0, WIDTH)
    if TRANSPOSED:
        target = out + column.to(tl.int64)[:, None] * column_stride + row[None, :]
        tl.store(target, tl.trans(value), mask=valid[None, :])
    else:
        tl.store(out + row[:, None] * row_stride + column[None, :], value, mask=valid[:, None])


@triton.jit
def quantize_rows(
    x,
    x_stride,
    column_scales,
    out,
    out_stride,
    scales,
    columns,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row, which it holds whole."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(column_scales + column, mask=inside, other=0.0)
    scale = _scale_of(tl.max(tl.abs(value), axis=0))
    tl.store(scales + row, scale)
    tl.store(out + row * out_stride + column, tl.div_rn(value, scale).to(tl.float8e4nv), mask=inside)


@triton.jit
def _place_of(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tiles of GROUP rows go column by column, so that those which run at a time share their operands in the cache."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = min(row_tiles - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def _with_low_rank(
    total,
    low_left,
    low_right,
    first_row,
    first_column,
    rank,
    BY_RANK: tl.constexpr,
):
    a = low_left.load([first_row, rank])
    if BY_RANK:  # noqa: SIM108  # Triton: the two are of different shapes
        b = low_right.load([rank, first_column])
    else:
        b = low_right.load([first_column, rank]).T
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _finished(
    total,
    tile_row,
    tile_column,
    row_scales,
    column_scales,
    low_left,
    low_right,
    bias,
    out,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    COLUMN_SCALED: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BY_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scale a tile of the sum, add what is of the compute dtype, round once and store."""
    first_row, first_column = tile_row * BLOCK_ROWS, tile_column * BLOCK_COLUMNS
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    total *= tl.load(row_scales + row, mask=row < rows, other=0.0)[:, None]
    if COLUMN_SCALED:
        total *= tl.load(column_scales + column, mask=column < columns, other=0.0)[None, :]
    if RANK_BLOCKS == 1:  # a second loop inside would keep the compiler from joining that of tiles with that of sums
        total = _with_low_rank(total, low_left, low_right, first_row, first_column, 0, BY_RANK)
    elif RANK_BLOCKS > 1:
        for number in tl.range(0, RANK_BLOCKS, num_stages=1):
            rank = number * BLOCK_RANKS
            total = _with_low_rank(total, low_left, low_right, first_row, first_column, rank, BY_RANK)
    if BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if PARTS == 2:  # the room that a tile passes through on its way out is half as large
        halves = tl.permute(tl.reshape(total, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        out.store([first_row, first_column], first.to(DTYPE))
        out.store([first_row, first_column + BLOCK_COLUMNS // 2], second.to(DTYPE))
    else:
        out.store([first_row, first_column], total.to(DTYPE))


@triton.jit(do_not_specialize=["rows"])  # each packed batch has another
def product(
    left,
    right,
    row_scales,
    column_scales,
    low_left,
    low_right,
    bias,
    out,
    rows,
    columns,
    inner,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMN_SCALED: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BY_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT_SUM: tl.constexpr,
    PARTS: tl.constexpr,
    JOINED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Matrices are tensor descriptors: `left` and `right` of e4m3 `[rows, inner]` and `[columns, inner]`, for tensor
    cores take 8-bit operands along the inner dimension only; `low_left` `[rows, R]`, `low_right` `[columns, R]` or,
    BY_RANK, `[R, columns]`. Beyond their edges they read zeros and write nothing.

    Each program makes one tile after the other; JOINED, it loads for the next while it finishes one. Hopper's tensor
    cores sum 8-bit products with some 14 bits (DeepSeek-V3 technical report, section 3.3.2); EXACT_SUM, the sum over
    each BLOCK_INNER is added to the others in float32 outside of them.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=JOINED):
        tile_row, tile_column = _place_of(tile, row_tiles, column_tiles, GROUP)
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(tl.cdiv(inner, BLOCK_INNER)):
            a = left.load([tile_row * BLOCK_ROWS, step * BLOCK_INNER])
            b = right.load([tile_column * BLOCK_COLUMNS, step * BLOCK_INNER])
            total = tl.dot(a, b.T, total, max_num_imprecise_acc=BLOCK_INNER if EXACT_SUM else None)
        _finished(
            total, tile_row, tile_column, row_scales, column_scales, low_left, low_right, bias, out, rows, columns,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS, COLUMN_SCALED, RANK_BLOCKS, BY_RANK, BIAS, PARTS, DTYPE,
        )  # fmt: skip
