"""Which attention serves samples of unequal lengths on a device: flash attention once it has proved itself there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import (
    Attention,
    FlashVarlen,
    HeadCounts,
    SampleBySample,
    Samples,
    Softmax,
)

LONGEST_HEAD = 256
"""Head size of FlashAttention-2's largest kernels."""

TRIAL_LENGTHS, TRIAL_WINDOW = (5, 130, 1, 64), 48
"""More than one tile of keys, less than one, and a single token."""

LARGEST_ERROR = 2.0**-5
"""Relative, of outputs and gradients in the norm. Both sides round probabilities and products to bfloat16 (2^-9 each),
sum in float32 and round again: some 2^-7. A sample that sees a neighbour's token differs by its share, over 2^-3."""


@dataclass(frozen=True, slots=True)
class UnevenAttention:
    """`words` go into the run's `kernel_path`."""

    attention: Attention
    words: str


SAMPLE_BY_SAMPLE = UnevenAttention(SampleBySample(), "packed rows sample by sample")


@cache
def proved_varlen(
    device: torch.device, heads: HeadCounts, dtype: torch.dtype, *, with_sinks: bool = False
) -> UnevenAttention:
    """Flash attention over cumulative lengths, or one sample after another, with the reason. `with_sinks`: tried with
    them."""
    refusal = _refusal(device, heads, dtype, with_sinks)
    if refusal is not None:
        return UnevenAttention(SampleBySample(), f"{SAMPLE_BY_SAMPLE.words} ({refusal})")
    return UnevenAttention(FlashVarlen(), "packed rows by flash attention")


def _refusal(device: torch.device, heads: HeadCounts, dtype: torch.dtype, with_sinks: bool) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention does not compute in {str(dtype).removeprefix('torch.')}"
    if heads.size > LONGEST_HEAD:
        return f"flash attention has no heads of {heads.size}"
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return f"torch {torch.__version__} has no flash attention over lengths"
    try:
        error = largest_error(FlashVarlen(), device, heads, dtype, with_sinks=with_sinks)
    except Exception as problem:  # torch raises TypeError, RuntimeError and NotImplementedError where a build lacks it
        return f"flash attention does not run here: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    return None if error < LARGEST_ERROR else "flash attention computed something else than torch"


def largest_error(
    attention: Attention, device: torch.device, heads: HeadCounts, dtype: torch.dtype, *, with_sinks: bool = False
) -> float:
    """Of outputs and gradients of a small batch, with a window and without, relative to `SampleBySample`."""
    samples = Samples.of(TRIAL_LENGTHS, device)
    rows, columns = sum(TRIAL_LENGTHS), heads.query_columns + 2 * heads.key_columns
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(rows, columns, generator=generator).to(device, dtype)
    upstream = torch.randn(rows, heads.query_columns, generator=generator).to(device, dtype)
    sinks = torch.randn(heads.query, generator=generator).to(device, dtype) if with_sinks else None
    errors = [
        (found.float() - expected.float()).norm() / expected.float().norm()
        for softmax in (Softmax(heads.size**-0.5, window, sinks) for window in (None, TRIAL_WINDOW))
        for found, expected in zip(
            _computed(attention, projected, upstream, heads, samples, softmax),
            _computed(SampleBySample(), projected, upstream, heads, samples, softmax),
            strict=True,
        )
    ]
    return float(torch.stack(errors).max())


def _computed(
    attention: Attention,
    projected: Tensor,
    upstream: Tensor,
    heads: HeadCounts,
    samples: Samples,
    softmax: Softmax,
) -> tuple[Tensor, ...]:
    parts = projected.split((heads.query_columns, heads.key_columns, heads.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, heads.size)) for part in parts)
    mixed = attention(query, key, value, samples, softmax, with_graph=True)
    return mixed.output, *mixed.backward(upstream)
