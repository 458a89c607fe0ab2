# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Triton kernels of the fused step; `triton_operations` launches them.

Importing this module needs Triton. Every kernel reads its inputs once, computes in float32 and rounds when it stores;
index arithmetic on rows is 64-bit, because `rows * columns` passes 2^31 for long batches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_hal_backends.torch_family.dropout_kernel import is_kept
from qlora_hal_backends.torch_family.fused.reference import GELU_CUBE, GELU_SCALE

_GELU_SCALE, _GELU_CUBE = tl.constexpr(GELU_SCALE), tl.constexpr(GELU_CUBE)


@triton.jit
def _decoded_blocks(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    out,
    columns,
    out_stride,
    block_count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Two codes a byte, the high half first; one scale a block, itself a code of a second table where nested.

    A block lies within one row (the caller sees to it), so rows and columns are found once a block.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < block_count
    if NESTED:
        index = tl.load(absmax + block, mask=valid, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_absmax + block // NESTED_BLOCK, mask=valid, other=0.0)
        scale += offset
    else:
        scale = tl.load(absmax + block, mask=valid, other=0.0)
    within = tl.arange(0, BLOCK // 2)
    pair = tl.load(packed + block.to(tl.int64)[:, None] * (BLOCK // 2) + within[None, :], mask=valid[:, None], other=0)
    pair = pair.to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    in_a_row = columns // BLOCK
    row = block // in_a_row  # of 32 bits: a division of 64 is a hundred instructions
    start = row.to(tl.int64) * out_stride + (block - row * in_a_row) * BLOCK
    target = out + start[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(target, tl.interleave(high, low).to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def dequantize(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    out,
    columns,
    out_stride,
    block_count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    _decoded_blocks(
        packed,
        absmax,
        nested_absmax,
        nested_code,
        offset,
        code,
        out,
        columns,
        out_stride,
        block_count,
        BLOCK,
        BLOCKS,
        NESTED_BLOCK,
        NESTED,
    )


@triton.jit
def place(source, target, table, ELEMENTS: tl.constexpr):
    entry = table + tl.program_id(0) * 5
    start = tl.load(entry)
    place = tl.load(entry + 1)
    columns = tl.load(entry + 3).to(tl.int32)  # a division of 64 bits is a hundred instructions
    count = tl.load(entry + 2).to(tl.int32) * columns
    stride = tl.load(entry + 4)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = element // columns
    x = tl.load(source + start + element, mask=(element < count) & (start >= 0), other=0.0)
    tl.store(target + place + row * stride + (element - row * columns), x, mask=element < count)


@triton.jit
def copy_rows(source, source_stride, out, out_stride, N, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(source + row * source_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column, x, mask=column < N)


@triton.jit
def add_norm(
    residual,
    residual_stride,
    pending,
    h,
    weight,
    out,
    out_stride,
    epsilon,
    D: tl.constexpr,
    PENDING: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PENDING:
        x += tl.load(pending + row * D + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(h.dtype.element_ty)
        tl.store(h + row * D + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x) / D + epsilon)
    y = x * inverse_rms * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    gradient,
    gradient_stride,
    h,
    h_stride,
    weight,
    residual_gradient,
    residual_stride,
    out,
    out_stride,
    out_exact,
    normed,
    epsilon,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr,
    NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x) / D + epsilon)
    unit = x * inverse_rms
    if NORMED:
        tl.store(normed + row * D + column, (unit * w).to(normed.dtype.element_ty), mask=inside)
    weighted = g * w
    d = inverse_rms * (weighted - unit * (tl.sum(weighted * unit) / D))
    if RESIDUAL:
        d += tl.load(residual_gradient + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if EXACT:
        tl.store(out_exact + row * D + column, d.to(out_exact.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + column, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activated(gate, GELU: tl.constexpr):
    """The activation of a gate and its derivative."""
    if GELU:
        # Tensors stand before the constants: Triton's interpreter would take the product for a constant. By the decay
        # (1 + tanh) / 2 is exact where tanh is near -1, and nothing overflows.
        square = gate * gate
        inner = (gate + gate * square * _GELU_CUBE) * _GELU_SCALE
        decay = tl.exp(tl.abs(inner) * -2.0)
        share = tl.where(inner < 0.0, decay, 1.0) / (1.0 + decay)
        steepness = 2.0 * decay / ((1.0 + decay) * (1.0 + decay))  # (1 - tanh^2) / 2
        return gate * share, share + gate * steepness * (square * (3.0 * _GELU_CUBE) + 1.0) * _GELU_SCALE
    else:
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid)


@triton.jit
def swiglu(gate_up, gate_up_stride, out, F, out_stride, GELU: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < F
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activated(gate, GELU)
    tl.store(out + row * out_stride + column, (activated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    gate_up, gate_up_stride, gradient, out, product, F, out_stride, GELU: tl.constexpr, WIDTH: tl.constexpr
):
    """Each element is read before it is written, and by no other program: results may stand where the inputs did."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < F
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * F + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, GELU)
    gate_gradient = g * up * slope
    tl.store(product + row * F + column, (activated * up).to(product.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + column, gate_gradient.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + F + column, (g * activated).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned_together(column, HALF: tl.constexpr, TURNED: tl.constexpr):
    """The two coordinates of a head's pair: those that turn lie in the halves of its first 2 TURNED coordinates, the
    pairs of the others behind them."""
    if TURNED == HALF:
        return column, column + HALF
    else:
        return column + tl.where(column < TURNED, 0, TURNED), column + tl.where(column < TURNED, TURNED, HALF)


@triton.jit
def _angles(cos, sin, position, column, TURNED: tl.constexpr):
    """Of one row's pairs; none of those that do not turn."""
    c = tl.load(cos + position * TURNED + column, mask=column < TURNED, other=1.0)
    s = tl.load(sin + position * TURNED + column, mask=column < TURNED, other=0.0)
    return c, s


@triton.jit
def rotate(
    source,
    source_stride,
    out,
    out_stride,
    cos,
    sin,
    positions,
    weights,
    epsilon,
    heads,
    query_heads,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row's tile of heads, each as pairs of coordinates."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < HALF)
    one, other = _turned_together(column, HALF, TURNED)
    read = source + row * source_stride + head * (2 * HALF)
    first = tl.load(read + one, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + other, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        inverse_rms = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + epsilon)
        weight = weights + tl.where(head >= query_heads, 2 * HALF, 0)
        first = first * inverse_rms[:, None] * tl.load(weight + one, mask=inside, other=0.0).to(tl.float32)
        second = second * inverse_rms[:, None] * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
    c, s = _angles(cos, sin, tl.load(positions + row), column, TURNED)
    target = out + row * out_stride + head * (2 * HALF)
    tl.store(target + one, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + other, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["time"])  # each packed batch has another
def rotate_backward(
    gradient,
    batch_stride,
    head_stride,
    time_stride,
    time,
    out,
    out_stride,
    source,
    source_stride,
    cos,
    sin,
    positions,
    weight,
    epsilon,
    heads,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < HALF)
    one, other = _turned_together(column, HALF, TURNED)
    origin = gradient + (row // time) * batch_stride + (row % time) * time_stride + head * head_stride
    first = tl.load(origin + one, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(origin + other, mask=inside, other=0.0).to(tl.float32)
    c, s = _angles(cos, sin, tl.load(positions + row), column, TURNED)
    rotated = first
    first = first * c + second * s
    second = second * c - rotated * s
    if NORM:
        read = source + row * source_stride + head * (2 * HALF)
        x1 = tl.load(read + one, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(read + other, mask=inside, other=0.0).to(tl.float32)
        first *= tl.load(weight + one, mask=column < HALF, other=0.0).to(tl.float32)
        second *= tl.load(weight + other, mask=column < HALF, other=0.0).to(tl.float32)
        inverse_rms = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + epsilon)[:, None]
        x1 *= inverse_rms
        x2 *= inverse_rms
        along = ((tl.sum(first * x1, 1) + tl.sum(second * x2, 1)) / (2 * HALF))[:, None]
        first = inverse_rms * (first - x1 * along)
        second = inverse_rms * (second - x2 * along)
    target = out + row * out_stride + head * (2 * HALF)
    tl.store(target + one, first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + other, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def drop(x, x_stride, tokens, channels, out, out_stride, K, threshold, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < K
    words = tl.load(channels + column, mask=inside, other=0).to(tl.uint32, bitcast=True)
    kept = is_kept(words + tl.load(tokens + row).to(tl.uint32, bitcast=True), threshold)
    value = tl.load(x + row * x_stride + column, mask=inside & kept, other=0.0)
    tl.store(out + row * out_stride + column, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])  # each packed batch has another
def add_dropped(
    product,
    v,
    v_stride,
    a,
    a_stride,
    tokens,
    channels,
    out,
    out_stride,
    rows,
    K,
    threshold,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < K)[None, :]
    rank = tl.arange(0, PADDED)
    total = tl.load(product + row[:, None] * K + column[None, :], mask=inside, other=0.0)
    of_row = tl.load(tokens + row, mask=row < rows, other=0).to(tl.uint32, bitcast=True)
    for projection in range(PROJECTIONS):
        first = projection * RANK + rank
        left = tl.load(
            v + row[:, None] * v_stride + first[None, :],
            mask=(row < rows)[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        right = tl.load(
            a + first[:, None].to(tl.int64) * a_stride + column[None, :],
            mask=(rank < RANK)[:, None] & (column < K)[None, :],
            other=0.0,
        )
        words = tl.load(channels + projection * K + column, mask=column < K, other=0).to(tl.uint32, bitcast=True)
        kept = is_kept(of_row[:, None] + words[None, :], threshold)
        total += tl.where(kept, tl.dot(left, right, input_precision="ieee"), 0.0)
    tl.store(out + row[:, None] * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy(logits, targets, losses, vocabulary, scale, GRADIENT: tl.constexpr, WIDTH: tl.constexpr):
    """Running maximum and sum (Milakov & Gimelshein 2018), then the gradient over the same row, in place."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    origin = logits + row * vocabulary
    column = tl.arange(0, WIDTH)
    highest = float("-inf")
    total = 0.0
    picked = 0.0
    for start in range(0, vocabulary, WIDTH):
        x = tl.load(origin + start + column, mask=start + column < vocabulary, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - raised) + tl.sum(tl.exp(x - raised))
        highest = raised
        picked += tl.sum(tl.where(start + column == target, x, 0.0))
    normalizer = highest + tl.log(total)
    tl.store(losses + row, normalizer - picked)
    if GRADIENT:
        for start in range(0, vocabulary, WIDTH):
            inside = start + column < vocabulary
            x = tl.load(origin + start + column, mask=inside, other=0.0).to(tl.float32)
            g = (tl.exp(x - normalizer) - tl.where(start + column == target, 1.0, 0.0)) * scale
            tl.store(origin + start + column, g.to(logits.dtype.element_ty), mask=inside)
