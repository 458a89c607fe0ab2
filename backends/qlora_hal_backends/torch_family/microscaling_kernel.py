# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""`microscaling.decoded` in one pass over memory, for GPUs: torch's reads and writes eight times as much on the way.
Importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS = 64
"""Of one program: 2048 numbers."""


@triton.jit
def _number(code):
    """A sign, two bits of an exponent and one of a mantissa, as the bits of a float32. Below 1 there are 0 and 0.5."""
    magnitude = code & 7
    bits = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    bits = tl.where(magnitude < 2, magnitude * (126 << 23), bits)
    return (bits | (code >> 3) << 31).to(tl.float32, bitcast=True)


@triton.jit
def decode(packed, scales, out, groups, GROUPS: tl.constexpr):
    """Two codes a byte, the low half first; 16 bytes to a scale, which is an exponent: 0 is 2^-127, a float32 below
    the normal ones."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    valid = group < groups
    scale = tl.load(scales + group, mask=valid, other=0).to(tl.int32)
    power = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)[:, None]
    first = group.to(tl.int64)[:, None]
    pair = tl.load(packed + first * 16 + tl.arange(0, 16)[None, :], mask=valid[:, None], other=0).to(tl.int32)
    numbers = tl.interleave(_number(pair & 15) * power, _number(pair >> 4) * power)
    tl.store(out + first * 32 + tl.arange(0, 32)[None, :], numbers.to(out.dtype.element_ty), mask=valid[:, None])


def decoded(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See `microscaling.decoded`."""
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=dtype, device=packed.device)
    groups = scales.numel()
    decode[(triton.cdiv(groups, _GROUPS),)](
        packed.contiguous(), scales.contiguous(), out, groups, GROUPS=_GROUPS, num_warps=2
    )
    return out
