"""Causal attention of the fused schedule, over samples of any lengths that lie end to end in a batch's rows.

Queries, keys and values are read where the projections left them: views `[M, heads, d]` of their buffer. No mask of
time x time is made, and keys and values are not repeated for grouped heads, where a kernel allows it:

    samples of one length       a rectangle: scaled_dot_product_attention, causal
    samples of other lengths,   `FlashVarlen`: FlashAttention-2 over cumulative lengths (Dao 2023), where the device has
    or a window                 it and has shown that it computes what torch does; `SampleBySample` elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qlora_hal_backends.torch_family.device import has_queue

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values, each `[batch, heads, time, d]` of any strides, with M = batch * time rows."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a batch, end to end. `lengths` stand on the host, so that nothing waits for the device;
    `offsets` int32 `[n + 1]` holds where each begins, and M."""

    lengths: Sequence[int]
    offsets: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Samples:
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if has_queue(device):
            offsets = offsets.pin_memory()
        return cls(lengths, offsets.to(device, non_blocking=True), max(lengths))

    @property
    def are_a_rectangle(self) -> bool:
        return all(length == self.longest for length in self.lengths)


class Mixed(Protocol):
    """What attention gives, and what it keeps for backward, which runs once."""

    @property
    def output(self) -> Tensor:
        """`[M, h * d]`, without a graph."""
        ...

    def backward(self, gradient: Tensor) -> Gradients:
        """From the gradient of `output`."""
        ...


class Attention(Protocol):
    """Causal within each sample. With `window` w a token sees itself and the w - 1 before it. `with_graph` False is
    evaluation: nothing is kept."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        *,
        scale: float,
        window: int | None,
        with_graph: bool,
    ) -> Mixed: ...


@dataclass(frozen=True, slots=True)
class CausalAttention:
    """`Attention`: rectangles by torch, everything else by `uneven`."""

    uneven: Attention

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        *,
        scale: float,
        window: int | None,
        with_graph: bool,
    ) -> Mixed:
        if window is not None and window >= samples.longest:
            window = None
        if window is not None or not samples.are_a_rectangle:
            return self.uneven(query, key, value, samples, scale=scale, window=window, with_graph=with_graph)
        shape = (len(samples.lengths), samples.longest)
        leaves = [part.unflatten(0, shape).transpose(1, 2).detach().requires_grad_() for part in (query, key, value)]
        with torch.set_grad_enabled(with_graph):
            mixed = _torch_attention(*leaves, mask=None, scale=scale)
        return _Rectangle(leaves, mixed)


@dataclass(slots=True)
class _Rectangle:
    """Autograd works inside the attention. Leaves and `mixed` are `[batch, heads, time, d]`."""

    leaves: Sequence[Tensor]
    mixed: Tensor

    @property
    def output(self) -> Tensor:
        # Fused attention lays its output out so that this is a view.
        return self.mixed.detach().transpose(1, 2).flatten(0, 1).flatten(1)

    def backward(self, gradient: Tensor) -> Gradients:
        batch, heads, time, size = self.mixed.shape
        upstream = gradient.view(batch, time, heads, size).transpose(1, 2)
        query, key, value = torch.autograd.grad(self.mixed, self.leaves, upstream)
        return query, key, value


class SampleBySample:
    """`Attention` of any torch and any dtype: one call for each sample, so that no token is masked that need not be.
    Costs launches, not work."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        *,
        scale: float,
        window: int | None,
        with_graph: bool,
    ) -> Mixed:
        leaves = [part.detach().requires_grad_() for part in (query, key, value)]
        with torch.set_grad_enabled(with_graph):
            # The gradient of a split is one concatenation; that of slices would be a whole buffer for each.
            parts = zip(*(leaf.split(list(samples.lengths)) for leaf in leaves), strict=True)
            mixed = torch.cat([_one_sample(*sample, scale=scale, window=window) for sample in parts])
        return _Graph(leaves, mixed)


@dataclass(slots=True)
class _Graph:
    """Leaves and `mixed` are `[M, heads, d]`."""

    leaves: Sequence[Tensor]
    mixed: Tensor

    @property
    def output(self) -> Tensor:
        return self.mixed.detach().flatten(1)

    def backward(self, gradient: Tensor) -> Gradients:
        query, key, value = torch.autograd.grad(self.mixed, self.leaves, gradient.view_as(self.mixed))
        return _one_row(query), _one_row(key), _one_row(value)


class FlashVarlen:
    """`Attention` by the kernels behind `torch.nn.attention.varlen.varlen_attn`, called without autograd: float16 and
    bfloat16, heads of up to 256 on NVIDIA and AMD. Grouped heads and windows are the kernels' own."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        *,
        scale: float,
        window: int | None,
        with_graph: bool,
    ) -> Mixed:
        mixed = _Flash(query, key, value, samples, scale, window)
        return mixed if with_graph else _Output(mixed.output)


class _Flash:
    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, samples: Samples, scale: float, window: int | None
    ) -> None:
        self._inputs = (query, key, value)
        # The kernels want a bound on the lengths; a bound of one token takes a path for decoding.
        longest = max(2, samples.longest)
        self._samples = (samples.offsets, samples.offsets, longest, longest)
        self._settings = {
            "scale": scale,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": 0,
        }
        self._is_causal = window is None
        self._mixed, self._log_sums, *self._generator, _ = torch.ops.aten._flash_attention_forward(
            *self._inputs, *self._samples, 0.0, self._is_causal, False, **self._settings
        )

    @property
    def output(self) -> Tensor:
        rows: Tensor = self._mixed.flatten(1)
        return rows

    def backward(self, gradient: Tensor) -> Gradients:
        query, key, value = torch.ops.aten._flash_attention_backward(
            gradient.view_as(self._mixed),
            *self._inputs,
            self._mixed,
            self._log_sums,
            *self._samples,
            0.0,
            self._is_causal,
            *self._generator,
            **self._settings,
        )
        return _one_row(query), _one_row(key), _one_row(value)


@dataclass(frozen=True, slots=True)
class _Output:
    output: Tensor

    def backward(self, gradient: Tensor) -> Gradients:
        raise AssertionError("evaluation keeps nothing for backward")


def _one_sample(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """`[time, heads, d]` of one sample."""
    mask = None
    if window is not None and window < query.shape[0]:
        everything = torch.ones(query.shape[0], query.shape[0], dtype=torch.bool, device=query.device)
        mask = everything.tril().triu(1 - window)
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return _torch_attention(*parts, mask=mask, scale=scale)[0].transpose(0, 1)


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """`[batch, heads, time, d]`, causal without a mask."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and (mask is not None or query.dtype == torch.float32):
        # The kernels that take a mask or float32 know no grouped heads; torch would fall back to whole matrices.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        grouped = False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _one_row(gradient: Tensor) -> Tensor:
    """`[M, heads, d]` as `[1, heads, M, d]`."""
    return gradient.transpose(0, 1)[None]
