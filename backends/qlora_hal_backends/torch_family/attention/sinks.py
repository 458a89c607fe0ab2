"""Attention with sinks (gpt-oss) in transformers' layers, in the place of their eager one.

Theirs makes the scores of all pairs of tokens five times over, and gpt-oss's layers are not told where a packed row's
samples begin. This one never holds scores where flash attention serves, sees windows and samples, and takes a mask from
nobody: positions that start again begin a sample, as everywhere in transformers, and what is padded on the right is
seen by nothing before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import (
    FlashCall,
    FlashKept,
    FlashVarlen,
    HeadCounts,
    Samples,
    Softmax,
    one_sample,
    sample_by_sample,
)
from qlora_hal_backends.torch_family.attention.varlen import proved_varlen

NAME = "samples_with_sinks"
"""What transformers' table of attentions calls it, and a model's configuration."""
SAMPLE_LENGTHS = "sample_lengths"
"""The name under which a packed batch's lengths pass through transformers' layers."""


def register() -> str:
    """Put it into transformers' table, in which no mask belongs to it, so that none is made. Gives its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def is_used(causal: Any) -> bool:
    return str(causal.config.get_text_config()._attn_implementation) == NAME


def words_of(causal: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Which attention serves, for the run's `kernel_path`; empty where the model has no sinks or transformers' own."""
    if not is_used(causal):
        return ""
    layer = next(module for module in causal.modules() if hasattr(module, "sinks"))
    count = len(layer.sinks)
    heads = HeadCounts(count, count // layer.num_key_value_groups, layer.head_dim)
    return f"sinks: {proved_varlen(device, heads, dtype, with_sinks=True).words}"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    s_aux: Tensor,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    sample_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`[batch, heads, time, d]` to `[batch, time, heads, d]`, as transformers' attentions do. `sample_lengths` are the
    samples of all rows, end to end, where the host knows them; else positions on the device are asked.

    Raises ValueError for a mask, which would be forgotten."""
    if attention_mask is not None:
        raise ValueError(f"{NAME} takes no mask: samples are told apart by their positions")
    batch, heads, time, size = query.shape
    softmax = Softmax(scaling, sliding_window, s_aux)
    if key.shape[2] != time:
        return _after_cached_keys(query, key, value, softmax), None
    lengths = tuple(sample_lengths or _lengths_in(position_ids, batch, time))
    rows, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    counts = HeadCounts(heads, key.shape[1], size)
    served = proved_varlen(query.device, counts, query.dtype, with_sinks=True).attention
    if isinstance(served, FlashVarlen):
        samples = _samples(lengths, query.device)
        call = FlashCall(samples.longest, scaling, softmax.over(samples.longest).window)
        mixed = _Flash.apply(rows, keys, values, s_aux, samples.offsets, call)  # type: ignore[no-untyped-call]
    else:
        mixed = sample_by_sample(rows, keys, values, lengths, softmax)
    return mixed.view(batch, time, heads, size), None


def _after_cached_keys(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """The tokens of a continuation, each row one sample whose earlier keys were cached."""
    rows = zip(*(part.transpose(1, 2) for part in (query, key, value)), strict=True)
    return torch.stack([one_sample(query, key, value, softmax) for query, key, value in rows])


def _lengths_in(position_ids: Tensor | None, batch: int, time: int) -> tuple[int, ...]:
    """Of the samples, end to end. One row of positions for all rows is transformers' own count, without a sample's end;
    any other waits for the device."""
    if position_ids is None or (len(position_ids) == 1 < batch):
        return (time,) * batch
    begins = position_ids.eq(0)
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten().tolist()
    return tuple(end - start for start, end in pairwise([*starts, batch * time]))


@lru_cache(maxsize=4)
def _samples(lengths: tuple[int, ...], device: torch.device) -> Samples:
    """For all layers of a forward pass and of its recomputation, copied to the device once."""
    return Samples.of(lengths, device)


class _Flash(torch.autograd.Function):
    """The kernels of flash attention in autograd's graph: what is kept passes through its hooks, so that recomputation
    lets go of it and the host's memory may hold it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, offsets: Tensor, call: FlashCall
    ) -> Tensor:
        kept = call.forward(query, key, value, offsets, sinks)
        ctx.save_for_backward(*kept)
        ctx.call = call
        return kept.mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: FlashCall = ctx.call
        return *call.backward(gradient.contiguous(), FlashKept(*ctx.saved_tensors)), None, None, None
