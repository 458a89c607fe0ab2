"""Causal attention over samples of any lengths that lie end to end in a batch's rows, as the fused schedule calls it.

Queries, keys and values are read where the projections left them: views `[M, heads, d]` of their buffer. No mask of
time x time is made, and keys and values are not repeated for grouped heads, where a kernel allows it:

    samples of one length       a rectangle: scaled_dot_product_attention, causal, or the kernels that it would take
    samples of other lengths,   `FlashVarlen`: FlashAttention-2 over cumulative lengths (Dao 2023), where the device has
    or a window                 it and has shown that it computes what torch does; `SampleBySample` elsewhere

A sink (gpt-oss) is a score of each query head that takes its share of the softmax and gives nothing. It belongs to no
token, so every token sees it, within a window and in every sample. Sinks are frozen and have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qlora_hal_backends.torch_family.device import has_queue

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values, each `[batch, heads, time, d]` of any strides, with M = batch * time rows."""


@dataclass(frozen=True, slots=True)
class HeadCounts:
    query: int
    key_value: int
    size: int

    @property
    def query_columns(self) -> int:
        return self.query * self.size

    @property
    def key_columns(self) -> int:
        return self.key_value * self.size


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


@dataclass(frozen=True, slots=True)
class Softmax:
    """How a layer's scores become weights: times `scale`, over the tokens of the sample so far, or with `window` w over
    a token itself and the w - 1 before it. `sinks` are one score to each query head."""

    scale: float
    window: int | None = None
    sinks: Tensor | None = None

    def over(self, longest: int) -> Softmax:
        """The same for samples of at most so many tokens, without a window that all of them fit into."""
        fits = self.window is not None and self.window >= longest
        return replace(self, window=None) if fits else self


@dataclass(frozen=True, slots=True)
class Attended:
    """What was computed: with queries, keys and values all that backward reads. `output` is `[M, h * d]`, `log_sums`
    the log of each softmax's sum, `[heads, M]` or as its kernel lays it out, and `generator` the state of one that
    dropout would have used."""

    output: Tensor
    log_sums: Tensor
    generator: tuple[Tensor, ...]

    @property
    def large(self) -> tuple[Tensor, Tensor]:
        return self.output, self.log_sums

    def without_large(self) -> Attended:
        """A place for `with_large` to put them back."""
        empty = self.output.new_empty(0)
        return replace(self, output=empty, log_sums=empty)

    def with_large(self, large: Sequence[Tensor]) -> Attended:
        output, log_sums = large
        return replace(self, output=output, log_sums=log_sums)


class Mixed(Protocol):
    """What attention gives, and what it keeps for backward, which runs once."""

    @property
    def output(self) -> Tensor:
        """`[M, h * d]`, without a graph."""
        ...

    @property
    def attended(self) -> Attended | None:
        """What the same attention can be given in place of computing it again; None where it has to."""
        ...

    def backward(self, gradient: Tensor) -> Gradients:
        """From the gradient of `output`."""
        ...


class Attention(Protocol):
    """Causal within each sample. `with_graph` False is evaluation: nothing is kept. `attended` is of an earlier call
    with the same arguments, and nothing is computed again."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        softmax: Softmax,
        *,
        with_graph: bool,
        attended: Attended | None = None,
    ) -> Mixed: ...


class RectangleKernels(Protocol):
    """Attention over rows of one length, called without autograd: queries, keys, values and outputs are
    `[batch, heads, time, d]`."""

    def serve(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
        """Whether these are what torch itself would take."""
        ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attended: ...

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, scale: float
    ) -> Gradients: ...


@dataclass(frozen=True, slots=True)
class CausalAttention:
    """`Attention`: rectangles by torch, by `rectangles` where these are what torch takes, everything else by
    `uneven`."""

    uneven: Attention
    rectangles: RectangleKernels | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Samples,
        softmax: Softmax,
        *,
        with_graph: bool,
        attended: Attended | None = None,
    ) -> Mixed:
        softmax = softmax.over(samples.longest)
        if softmax.window is not None or softmax.sinks is not None or not samples.are_a_rectangle:
            return self.uneven(query, key, value, samples, softmax, with_graph=with_graph, attended=attended)
        shape = (len(samples.lengths), samples.longest)
        parts = [part.unflatten(0, shape).transpose(1, 2).detach() for part in (query, key, value)]
        if with_graph and self.rectangles is not None:
            query, key, value = parts
            if attended is None and self.rectangles.serve(query, key, value, softmax.scale):
                attended = self.rectangles.forward(query, key, value, softmax.scale)
            if attended is not None:
                return _ByKernels(self.rectangles, parts, softmax.scale, attended)
        leaves = [part.requires_grad_() for part in parts]
        with torch.set_grad_enabled(with_graph):
            mixed = _torch_attention(*leaves, mask=None, scale=softmax.scale)
        return _Rectangle(leaves, mixed)


@dataclass(frozen=True, slots=True)
class _ByKernels:
    """`parts` are queries, keys and values, `[batch, heads, time, d]`."""

    kernels: RectangleKernels
    parts: Sequence[Tensor]
    scale: float
    attended: Attended

    @property
    def output(self) -> Tensor:
        return self.attended.output

    def backward(self, gradient: Tensor) -> Gradients:
        batch, heads, time, size = self.parts[0].shape
        upstream = gradient.view(batch, time, heads, size).transpose(1, 2)
        query, key, value = self.parts
        return self.kernels.backward(upstream, query, key, value, self.attended, self.scale)


@dataclass(slots=True)
class _Rectangle:
    """Autograd works inside the attention. Leaves and `mixed` are `[batch, heads, time, d]`."""

    leaves: Sequence[Tensor]
    mixed: Tensor
    attended: None = None

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
        softmax: Softmax,
        *,
        with_graph: bool,
        attended: Attended | None = None,
    ) -> Mixed:
        leaves = query, key, value = tuple(part.detach().requires_grad_() for part in (query, key, value))
        with torch.set_grad_enabled(with_graph):
            mixed = sample_by_sample(query, key, value, samples.lengths, softmax)
        return _Graph(leaves, mixed)


def sample_by_sample(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], softmax: Softmax) -> Tensor:
    """`[M, heads, d]`, in autograd's graph."""
    # The gradient of a split is one concatenation; that of slices would be a whole buffer for each.
    parts = zip(*(part.split(list(lengths)) for part in (query, key, value)), strict=True)
    return torch.cat([one_sample(query, key, value, softmax) for query, key, value in parts])


@dataclass(slots=True)
class _Graph:
    """Leaves and `mixed` are `[M, heads, d]`."""

    leaves: Sequence[Tensor]
    mixed: Tensor
    attended: None = None

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
        softmax: Softmax,
        *,
        with_graph: bool,
        attended: Attended | None = None,
    ) -> Mixed:
        mixed = _Flash(query, key, value, samples, softmax, attended)
        return mixed if with_graph else _Output(mixed.output)


class _Flash:
    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, samples: Samples, softmax: Softmax, attended: Attended | None
    ) -> None:
        self._call = FlashCall(samples.longest, softmax.scale, softmax.window)
        if attended is None:
            self._kept = self._call.forward(query, key, value, samples.offsets, softmax.sinks)
        else:
            mixed = attended.output.view_as(query)
            large = (query, key, value, mixed, attended.log_sums, samples.offsets)
            self._kept = FlashKept(*large, *attended.generator)

    @property
    def output(self) -> Tensor:
        return self._kept.mixed.flatten(1)

    @property
    def attended(self) -> Attended:
        return Attended(self.output, self._kept.log_sums, (self._kept.seed, self._kept.unused))

    def backward(self, gradient: Tensor) -> Gradients:
        query, key, value = self._call.backward(gradient.view_as(self._kept.mixed), self._kept)
        return _one_row(query), _one_row(key), _one_row(value)


class FlashKept(NamedTuple):
    """What the backward kernel reads: query, key, value and `mixed` `[M, heads, d]`, the log of each softmax's sum
    `[heads, M]`, where samples begin, and the state of a generator that dropout would have used."""

    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    log_sums: Tensor
    offsets: Tensor
    seed: Tensor
    unused: Tensor


@dataclass(frozen=True, slots=True)
class FlashCall:
    """One call of the kernels, forward and backward, for samples of at most `longest` tokens."""

    longest: int
    scale: float
    window: int | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, sinks: Tensor | None) -> FlashKept:
        mixed, log_sums, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *self._samples(offsets), 0.0, self.window is None, False, **self._settings
        )
        if sinks is not None:
            # The sink is one more term of the sum. Backward makes the probabilities from the sum and takes each row's
            # mean gradient from the output, so with both corrected it gives the gradients of the whole softmax.
            all_sums = torch.logaddexp(log_sums, sinks.to(log_sums.dtype)[:, None])
            mixed.mul_(torch.exp(log_sums - all_sums).t()[:, :, None])
            log_sums = all_sums
        return FlashKept(query, key, value, mixed, log_sums, offsets, seed, unused)

    def backward(self, gradient: Tensor, kept: FlashKept) -> Gradients:
        query, key, value, mixed, log_sums, offsets, *generator = kept
        found: Gradients = torch.ops.aten._flash_attention_backward(
            gradient,
            query,
            key,
            value,
            mixed,
            log_sums,
            *self._samples(offsets),
            0.0,
            self.window is None,
            *generator,
            **self._settings,
        )
        return found

    def _samples(self, offsets: Tensor) -> tuple[Tensor, Tensor, int, int]:
        # The kernels want a bound on the lengths; a bound of one token takes a path for decoding.
        longest = max(2, self.longest)
        return offsets, offsets, longest, longest

    @property
    def _settings(self) -> dict[str, float | int]:
        left = -1 if self.window is None else self.window - 1
        return {"scale": self.scale, "window_size_left": left, "window_size_right": 0}


@dataclass(frozen=True, slots=True)
class _Output:
    output: Tensor
    attended: None = None

    def backward(self, gradient: Tensor) -> Gradients:
        raise AssertionError("evaluation keeps nothing for backward")


def one_sample(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """`[time, heads, d]` of one sample, of which `query` may be the last tokens alone, as where keys were cached."""
    if softmax.sinks is not None:
        return _with_sink(query, key, value, softmax.sinks, softmax)
    mask = _mask(query.shape[0], key.shape[0], softmax.window, query.device)
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return _torch_attention(*parts, mask=mask, scale=softmax.scale)[0].transpose(0, 1)


_SINK_COLUMNS = 8
"""Added to each head for a score that no token has: as many as kernels want in 16 bits."""


def _with_sink(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, softmax: Softmax) -> Tensor:
    """The sink as a first token that all others see. One more column, of ones in the queries, makes its score whatever
    a query is; its value is zero. So no mask is needed where none was, and any kernel of torch's computes it."""
    time, heads, size = query.shape
    repeats = heads // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    first = torch.zeros(1, heads, size + _SINK_COLUMNS, dtype=key.dtype, device=key.device)
    first[0, :, size] = sinks.to(key.dtype) / softmax.scale
    wider = partial(torch.nn.functional.pad, pad=(0, _SINK_COLUMNS))
    ones = torch.zeros(_SINK_COLUMNS, dtype=query.dtype, device=query.device)
    ones[0] = 1.0
    query = torch.cat((query, ones.expand(time, heads, -1)), dim=-1)
    mask = _mask(time, key.shape[0], softmax.window, query.device)
    if mask is None:
        query = torch.cat((torch.zeros_like(first), query))  # the sink's own, of which nothing is used
    else:
        mask = torch.nn.functional.pad(mask, (1, 0), value=True)
    key, value = torch.cat((first, wider(key))), torch.cat((torch.zeros_like(first), wider(value)))
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    mixed = _torch_attention(*parts, mask=mask, scale=softmax.scale)[0].transpose(0, 1)
    return mixed[-time:, :, :size]


def _mask(time: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last `time` of `keys` tokens see, bool `[time, keys]`; None where that is all up to themselves and each
    key has its query."""
    if time == keys and (window is None or window >= time):
        return None
    seen = torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)
    return seen if window is None else seen.triu(keys - time + 1 - window)


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
