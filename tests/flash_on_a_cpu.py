"""Causal attention over samples written from the definition, and the operators of flash and cuDNN attention made of it.

The kernels run on GPUs alone. Here they get an implementation for the CPU in plain torch, under torch's own schemas:
what is tested is what we hand them and how we read what they give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def flash_in_plain_torch() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _flash_forward, "CPU")
    library.impl("_flash_attention_backward", _flash_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def cudnn_in_plain_torch() -> Iterator[None]:
    """Over rows of one length; torch's attention does not take it by itself here."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", _cudnn_forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Written from the definition: one whole matrix of scores, softmax over what may be seen."""
    groups = query.shape[1] // key.shape[1]
    found = scores(query, key.repeat_interleave(groups, dim=1), lengths, window, scale)
    if sinks is not None:
        found = torch.cat((found, sinks.to(found.dtype)[:, None, None].expand(-1, found.shape[1], 1)), dim=-1)
    weights = found.softmax(dim=-1)[..., : key.shape[0]]
    return torch.einsum("hij,jhd->ihd", weights, value.repeat_interleave(groups, dim=1))


def scores(query: Tensor, key: Tensor, lengths: Sequence[int], window: int | None, scale: float) -> Tensor:
    """Of each token with each that it may see `[h, M, M]`."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sample))
    ago = place[:, None] - place[None, :]
    seen = (sample[:, None] == sample[None, :]) & (ago >= 0)
    if window is not None:
        seen &= ago < window
    return (torch.einsum("ihd,jhd->hij", query, key) * scale).masked_fill(~seen, -torch.inf)


def _bounds(cumulative: Tensor, window_left: int | None) -> tuple[list[int], int | None]:
    assert cumulative.dtype == torch.int32, "flash attention reads int32"
    window = None if window_left is None or window_left < 0 else window_left + 1
    return cumulative.diff().tolist(), window


def _flash_forward(query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, **settings):  # type: ignore[no-untyped-def]
    lengths, window = _bounds(cum_q, settings["window_size_left"])
    assert max(lengths) <= max_q == max_k
    assert settings["window_size_right"] == 0
    assert causal == (window is None), "a window is local attention to the kernels"
    mixed = dense(query, key, value, lengths, window, settings["scale"])
    groups = query.shape[1] // key.shape[1]
    found = scores(query, key.repeat_interleave(groups, dim=1), lengths, window, settings["scale"])
    empty = query.new_empty(0)
    return mixed, found.logsumexp(dim=-1), empty, empty, empty


def _flash_backward(  # type: ignore[no-untyped-def]
    gradient, query, key, value, out, sums, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, **settings
):
    assert gradient.is_contiguous()
    assert out.shape == query.shape
    lengths, window = _bounds(cum_q, settings["window_size_left"])
    # By hand: torch calls this below autograd.
    scale, groups = settings["scale"], query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    # As the kernels do: probabilities from the kept sums, the mean gradient of a row from its output.
    weights = torch.exp(scores(query, keys, lengths, window, scale) - sums[:, :, None])
    of_weights = torch.einsum("ihd,jhd->hij", gradient, values)
    of_scores = weights * (of_weights - torch.einsum("ihd,ihd->hi", gradient, out)[:, :, None]) * scale
    of_keys = torch.einsum("hij,ihd->jhd", of_scores, query)
    of_values = torch.einsum("hij,ihd->jhd", weights, gradient)
    summed = [part.unflatten(1, (-1, groups)).sum(dim=2) for part in (of_keys, of_values)]
    return torch.einsum("hij,jhd->ihd", of_scores, keys), *summed


def _end_to_end(part: Tensor) -> Tensor:
    """`[batch, heads, time, d]` as `[M, heads, d]`."""
    return part.transpose(1, 2).flatten(0, 1)


def _cudnn_forward(query, key, value, bias, sums, dropout, causal, debug=False, *, scale):  # type: ignore[no-untyped-def]
    assert bias is None
    assert sums
    assert causal
    batch, heads, time, size = query.shape
    lengths = [time] * batch
    query, key, value = (_end_to_end(part) for part in (query, key, value))
    mixed = dense(query, key, value, lengths, None, scale)
    found = scores(query, key.repeat_interleave(heads // key.shape[1], dim=1), lengths, None, scale)
    by_row = found.logsumexp(dim=-1).unflatten(1, (batch, time)).transpose(0, 1).contiguous()
    empty = query.new_empty(0)
    output = mixed.view(batch, time, heads, size).transpose(1, 2)
    return output, by_row, empty, empty, time, time, empty, empty, empty


def _cudnn_backward(  # type: ignore[no-untyped-def]
    gradient, query, key, value, out, sums, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
):
    assert bias is cum_q is cum_k is None
    batch, _, time, _ = query.shape
    assert max_q == max_k == time
    offsets = torch.arange(0, batch * time + 1, time, dtype=torch.int32)
    parts = [_end_to_end(part) for part in (gradient, query, key, value, out)]
    found = _flash_backward(
        parts[0].contiguous(), *parts[1:], sums.transpose(0, 1).flatten(1), offsets, offsets, time, time, 0.0, True,
        seed, offset, scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return tuple(part.unflatten(0, (batch, time)).transpose(1, 2) for part in found)
