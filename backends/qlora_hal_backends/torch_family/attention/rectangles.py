"""Attention over rows of one length by cuDNN's kernels, called by name once they have proved themselves.

torch takes these kernels for such rows on recent NVIDIA GPUs. Called without autograd they are the same kernels, and
what they gave can wait elsewhere until backward: over long rows, to compute it again is most of what recomputation
costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from qlora_hal_backends.torch_family.attention.causal import (
    Attended,
    Attention,
    CausalAttention,
    Gradients,
    HeadCounts,
    RectangleKernels,
    SampleBySample,
    Samples,
    Softmax,
)
from qlora_hal_backends.torch_family.attention.varlen import LARGEST_ERROR

TRIAL_LENGTHS = (130, 130)
"""More than one tile of keys."""


class CudnnRectangles:
    """`RectangleKernels` of torch's own operators around cuDNN."""

    def serve(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
        grouped = query.shape[1] != key.shape[1]
        choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, scale=scale, enable_gqa=grouped)
        return bool(choice == SDPBackend.CUDNN_ATTENTION.value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attended:
        found: Sequence[Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        output, log_sums, *_, seed, offset, _ = found
        # The output is laid out as the queries are, so that this is a view.
        return Attended(output.transpose(1, 2).flatten(0, 1).flatten(1), log_sums, (seed, offset))

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, scale: float
    ) -> Gradients:
        batch, heads, time, size = query.shape
        output = attended.output.view(batch, time, heads, size).transpose(1, 2)
        # No bias, and no samples of other lengths: what autograd would pass on, too.
        found: Gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            gradient, query, key, value, output, attended.log_sums, *attended.generator,
            None, None, None, time, time, 0.0, True, scale=scale,
        )  # fmt: skip
        return found


@cache
def proved_rectangles(device: torch.device, heads: HeadCounts, dtype: torch.dtype) -> RectangleKernels | None:
    """cuDNN's kernels where torch takes them and they gave, called by name, what they give within torch's attention."""
    if device.type != "cuda" or not hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward"):
        return None
    kernels = CudnnRectangles()
    try:
        return kernels if give_what_torch_gives(kernels, device, heads, dtype) else None
    except (TypeError, RuntimeError):  # builds whose operators differ, and devices without them
        return None


def give_what_torch_gives(
    kernels: RectangleKernels, device: torch.device, heads: HeadCounts, dtype: torch.dtype
) -> bool:
    """Whether outputs are those of torch's attention bit for bit, and gradients as far as kernels of 16 bits agree: on
    a GPU attention's backward adds in an order of its own. Tried on what was just computed, and on what was given."""
    samples, softmax = Samples.of(TRIAL_LENGTHS, device), Softmax(heads.size**-0.5)
    rows, columns = sum(TRIAL_LENGTHS), heads.query_columns + 2 * heads.key_columns
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(rows, columns, generator=generator).to(device, dtype)
    upstream = torch.randn(rows, heads.query_columns, generator=generator).to(device, dtype)
    parts = projected.split((heads.query_columns, heads.key_columns, heads.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, heads.size)) for part in parts)

    def computed(attention: Attention, attended: Attended | None = None) -> tuple[Attended | None, tuple[Tensor, ...]]:
        mixed = attention(query, key, value, samples, softmax, with_graph=True, attended=attended)
        return mixed.attended, (mixed.output, *mixed.backward(upstream))

    _, (expected, *of_torch) = computed(CausalAttention(SampleBySample()))
    by_kernels = CausalAttention(SampleBySample(), kernels)
    attended, (output, *gradients) = computed(by_kernels)
    if attended is None or not torch.equal(output, expected):
        return False
    _, (_, *again) = computed(by_kernels, attended)
    pairs = [*zip(gradients, of_torch, strict=True), *zip(again, of_torch, strict=True)]
    return all(
        float((found.float() - right.float()).norm() / right.float().norm()) < LARGEST_ERROR for found, right in pairs
    )
