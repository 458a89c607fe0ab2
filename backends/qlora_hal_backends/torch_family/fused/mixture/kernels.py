# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Triton kernels for the feed-forward of a mixture; `triton_operations` launches them. Importing it needs Triton.

As in `fused.kernels`, inputs are read once, computed with in float32 and rounded when they are stored, and index
arithmetic on rows is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_hal_backends.torch_family.fused.kernels import _activated, _decoded_blocks


@triton.jit
def dequantize_stack(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offsets,
    code,
    out,
    columns,
    out_stride,
    expert_stride,
    block_count,
    nested_count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """`dequantize` of each expert, whose parts lie behind one another."""
    expert = tl.program_id(1).to(tl.int64)
    offset = 0.0
    if NESTED:
        offset = tl.load(offsets + expert)
    _decoded_blocks(
        packed + expert * block_count * (BLOCK // 2),
        absmax + expert * block_count,
        nested_absmax + expert * nested_count,
        nested_code,
        offset,
        code,
        out + expert * expert_stride,
        columns,
        out_stride,
        block_count,
        BLOCK,
        BLOCKS,
        NESTED_BLOCK,
        NESTED,
    )


@triton.jit
def _scores(logits, row, E, SIGMOID: tl.constexpr, EXPERTS: tl.constexpr):
    """Of one row; 0 beyond the last expert."""
    expert = tl.arange(0, EXPERTS)
    x = tl.load(logits + row * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        return tl.sigmoid(x)
    else:
        x = tl.exp(x - tl.max(x))
        return x / tl.sum(x)


@triton.jit
def _in_the_best_groups(left, expert, E, GROUPS: tl.constexpr, KEPT: tl.constexpr, PLACES: tl.constexpr):
    """A group counts for its two best together; what is in none of the best counts less than everything."""
    group, number = expert // (E // GROUPS), tl.arange(0, PLACES)
    totals = tl.full((PLACES,), float("-inf"), tl.float32)
    for j in range(GROUPS):
        mine = tl.where(group == j, left, float("-inf"))
        best = tl.argmax(mine, 0, tie_break_left=True)
        second = tl.max(tl.where(expert == best, float("-inf"), mine), 0)
        totals = tl.where(number == j, tl.max(mine, 0) + second, totals)
    found = tl.full(left.shape, float("-inf"), tl.float32)
    for _ in range(KEPT):
        best = tl.argmax(totals, 0, tie_break_left=True)
        found = tl.where(group == best, left, found)
        totals = tl.where(number == best, float("-inf"), totals)
    return found


@triton.jit
def route(
    logits,
    correction,
    weights,
    experts,
    E,
    factor,
    EACH: tl.constexpr,
    NORMALIZES: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    GROUP_PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The best is taken `EACH` times; what was taken counts less than everything."""
    row = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, PLACES)
    scores = _scores(logits, row, E, SIGMOID, EXPERTS)
    left = scores
    if CORRECTED:
        left += tl.load(correction + expert, mask=expert < E, other=0.0)
    left = tl.where(expert < E, left, float("-inf"))
    if GROUPS_KEPT < GROUPS:
        left = _in_the_best_groups(left, expert, E, GROUPS, GROUPS_KEPT, GROUP_PLACES)
    picked = tl.zeros((PLACES,), tl.float32)
    numbers = tl.zeros((PLACES,), tl.int32)
    for j in range(EACH):
        # Where a score is no number, none is the best, and any expert does: the loss is none either.
        best = tl.minimum(tl.argmax(left, 0, tie_break_left=True), E - 1)
        picked = tl.where(place == j, tl.sum(tl.where(expert == best, scores, 0.0)), picked)
        numbers = tl.where(place == j, best, numbers)
        left = tl.where(expert == best, float("-inf"), left)
    if NORMALIZES:
        picked = picked / tl.sum(picked)
    target = row * EACH + place
    tl.store(weights + target, (picked * factor).to(weights.dtype.element_ty), mask=place < EACH)
    tl.store(experts + target, numbers.to(tl.int16), mask=place < EACH)


@triton.jit
def route_backward(
    logits,
    experts,
    gradient,
    out,
    E,
    factor,
    EACH: tl.constexpr,
    NORMALIZES: tl.constexpr,
    SIGMOID: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Of softmax the gradient is p (g - sum p g), of the best by their sum the same with their shares; of a sigmoid's
    shares it is that times 1 - s."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    scores = _scores(logits, row, E, SIGMOID, EXPERTS)
    upstream = tl.zeros((EXPERTS,), tl.float32)
    share = tl.zeros((EXPERTS,), tl.float32)
    for j in range(EACH):
        chosen = expert == tl.load(experts + row * EACH + j).to(tl.int32)
        upstream = tl.where(chosen, tl.load(gradient + row * EACH + j), upstream)
        share = tl.where(chosen, scores, share)
    if NORMALIZES:
        share = share / tl.sum(share)
        d = share * (upstream - tl.sum(share * upstream))
    elif SIGMOID:
        d = share * upstream
    else:
        d = scores * (upstream - tl.sum(share * upstream))
    if SIGMOID:
        d *= 1.0 - scores
    tl.store(out + row * E + expert, (d * factor).to(out.dtype.element_ty), mask=expert < E)


@triton.jit(do_not_specialize=["count", "blocks"])  # each packed batch has others
def count_choices(chosen, counts, count, blocks, E, EXPERTS: tl.constexpr, PLACES: tl.constexpr):
    """How many of a block's places go to each expert, `[E, blocks]`: their running sum, expert by expert, says where
    the rows of a block's places for an expert end."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    expert = tl.arange(0, EXPERTS)
    number = tl.load(chosen + place, mask=place < count, other=-1).to(tl.int32)
    found = tl.sum((number[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + expert * blocks + tl.program_id(0), found, mask=expert < E)


@triton.jit(do_not_specialize=["count", "blocks"])  # each packed batch has others
def place_choices(
    chosen, counts, sums, order, back, ends, count, blocks, E, EXPERTS: tl.constexpr, PLACES: tl.constexpr
):
    block = tl.program_id(0)
    place = block * PLACES + tl.arange(0, PLACES)
    expert = tl.arange(0, EXPERTS)
    number = tl.load(chosen + place, mask=place < count, other=-1).to(tl.int32)
    hit = (number[:, None] == expert[None, :]).to(tl.int32)
    entry = expert * blocks + block
    start = tl.load(sums + entry, mask=expert < E, other=0) - tl.load(counts + entry, mask=expert < E, other=0)
    row = tl.sum(hit * (start[None, :] + tl.cumsum(hit, 0) - 1), 1)
    tl.store(order + row, place.to(tl.int64), mask=place < count)
    tl.store(back + place, row.to(tl.int64), mask=place < count)
    last = tl.load(sums + (expert + 1) * blocks - 1, mask=expert < E, other=0)
    tl.store(ends + expert, last, mask=(expert < E) & (block == 0))


@triton.jit
def send(tokens, token_stride, back, out, out_stride, D, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """By token, not by row: each is read once, however many go between its rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(tokens + token * token_stride + column, mask=column < D, other=0.0)
    for j in range(EACH):
        row = tl.load(back + token * EACH + j)
        tl.store(out + row * out_stride + column, x, mask=column < D)


@triton.jit(do_not_specialize=["rows"])  # each packed batch has another
def scale(thin, copy, copy_stride, factor, rows, RANKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < RANKS)  # the same for neighbours, which are then read and written together
    place = thin + row * RANKS + column
    x = (tl.load(place, mask=inside, other=0.0).to(tl.float32) * factor).to(thin.dtype.element_ty)
    tl.store(place, x, mask=inside)
    tl.store(copy + row * copy_stride + column, x, mask=inside)


@triton.jit
def collect(rows, row_stride, back, addend, out, D, EACH: tl.constexpr, ADDEND: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for j in range(EACH):
        row = tl.load(back + token * EACH + j)
        total += tl.load(rows + row * row_stride + column, mask=column < D, other=0.0).to(tl.float32)
    if ADDEND:
        total += tl.load(addend + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def weighted_swiglu(
    gate_up, gate_up_stride, weights, order, out, F, out_stride, GELU: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < F
    weight = tl.load(weights + tl.load(order + row)).to(tl.float32)
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activated(gate, GELU)
    tl.store(out + row * out_stride + column, (activated * up * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit
def weighted_swiglu_backward(
    gate_up,
    gate_up_stride,
    gradient,
    gradient_stride,
    weights,
    order,
    out,
    out_stride,
    product,
    product_stride,
    weight_gradient,
    F,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row: the gradient of its weight is a sum over all of it. Each element is read before it is written:
    the product may stand where its gradient did."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(order + row)
    weight = tl.load(weights + place).to(tl.float32)
    along = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, F, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < F
        gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * gate_up_stride + F + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
        activated, slope = _activated(gate, GELU)
        unweighted = activated * up
        along += g * unweighted
        g *= weight
        target = out + row * out_stride + column
        tl.store(target, (g * up * slope).to(out.dtype.element_ty), mask=inside)
        tl.store(target + F, (g * activated).to(out.dtype.element_ty), mask=inside)
        tl.store(
            product + row * product_stride + column, (unweighted * weight).to(product.dtype.element_ty), mask=inside
        )
    tl.store(weight_gradient + place, tl.sum(along))


@triton.jit
def add_to_experts(
    gradient, expert_stride, products, product_stride, row_stride, ends, COLUMNS, count, ELEMENTS: tl.constexpr
):
    expert = tl.program_id(1).to(tl.int64)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends + expert) > start:
        element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = element < count
        row = element // COLUMNS
        source = products + expert * product_stride + row.to(tl.int64) * row_stride + (element - row * COLUMNS)
        target = gradient + expert * expert_stride + element
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, tl.load(target, mask=inside, other=0.0) + x, mask=inside)
