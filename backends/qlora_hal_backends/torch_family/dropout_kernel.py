# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Dropout masks in one pass over memory, for GPUs; `lora_linear.kept_inputs` in a dozen. Importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_hal.contract import dropout

_FIRST, _SECOND, _THIRD = (tl.constexpr(shift) for shift in dropout.SHIFTS)
_FACTOR, _OTHER_FACTOR = tl.constexpr(dropout.FIRST_FACTOR), tl.constexpr(dropout.SECOND_FACTOR)
_WIDTH = 1024


@triton.jit
def is_kept(words, threshold):
    """`qlora_hal.contract.dropout.kept` for sums of token and channel words, as unsigned integers."""
    words ^= words >> _FIRST
    words *= _FACTOR
    words ^= words >> _SECOND
    words *= _OTHER_FACTOR
    words ^= words >> _THIRD
    return (words >> 1).to(tl.int32) >= threshold


@triton.jit
def _mask(tokens, channels, out, count, threshold, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = place < count
    words = tl.load(channels + place, mask=valid, other=0).to(tl.uint32, bitcast=True)
    kept = is_kept(words + tl.load(tokens + row).to(tl.uint32, bitcast=True), threshold)
    tl.store(out + row.to(tl.int64) * count + place, tl.where(kept, 1.0, 0.0).to(out.dtype.element_ty), mask=valid)


def mask(token_words: Tensor, channel_words: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """1 where `qlora_hal.contract.dropout.kept`, else 0: `[tokens, channels]` for int32 words."""
    out = torch.empty((len(token_words), len(channel_words)), dtype=dtype, device=token_words.device)
    grid = (len(token_words), triton.cdiv(len(channel_words), _WIDTH))
    _mask[grid](token_words, channel_words, out, len(channel_words), dropout.drop_below(rate), WIDTH=_WIDTH)
    return out
