# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""`optimizer.UpdateInParts` in one pass over memory, for GPUs. Importing it needs Triton.

In torch each of its operations reads and writes whole buffers: 128 bytes a number, where 30 are due. The adapters of a
mixture's experts are hundreds of millions of numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_hal.contract.values import StepSettings
from qlora_hal_backends.torch_family.flat_adapter import STATE_BLOCK, BlockOwners, FlatAdapter

_BLOCKS = 8
"""Blocks of `STATE_BLOCK` numbers of one program."""


@triton.jit
def mark_trained(gradients, owners, trained, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """1 for each owner whose gradient is not zero in every number. All who write, write the same."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    element = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    gradient = tl.load(gradients + element, mask=element < count, other=0.0)
    found = tl.sum((gradient != 0.0).to(tl.int32), 1) > 0  # NaN is not zero
    owner = tl.load(owners + block, mask=found, other=0)
    tl.store(trained + owner, 1, mask=found)


@triton.jit
def adamw(
    parameters,
    gradients,
    first,
    second,
    compute,
    owners,
    trained,
    figures,
    learning_rate,
    weight_decay,
    kept_first,
    new_first,
    kept_second,
    new_second,
    epsilon,
    count,
    STACKS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`figures`: whether the step applies, the clip factor, and the corrections of both moments."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    element = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    changed = element < tl.where(tl.load(figures) > 0.0, count, 0)
    if STACKS:
        owner = tl.load(owners + block, mask=block.to(tl.int64) * BLOCK < count, other=0)
        changed &= tl.load(trained + owner)[:, None] > 0
    gradient = tl.load(gradients + element, mask=changed, other=0.0) * tl.load(figures + 1)
    m = tl.load(first + element, mask=changed, other=0.0) * kept_first + gradient * new_first
    v = tl.load(second + element, mask=changed, other=0.0) * kept_second + gradient * gradient * new_second
    tl.store(first + element, m, mask=changed)
    tl.store(second + element, v, mask=changed)
    denominator = tl.sqrt(v / tl.load(figures + 3)) + epsilon
    p = tl.load(parameters + element, mask=changed, other=0.0)
    p = p * (1.0 - learning_rate * weight_decay) - learning_rate * (m / tl.load(figures + 2) / denominator)
    tl.store(parameters + element, p, mask=changed)
    if COPY:
        tl.store(compute + element, p.to(compute.dtype.element_ty), mask=changed)


class UpdateByKernel:
    """See `optimizer.Update`."""

    words = ""

    def __init__(self, flat: FlatAdapter) -> None:
        self._flat = flat
        blocks = BlockOwners.of(flat.stacks, len(flat.parameters), flat.parameters.device)
        self._owners = blocks.owners
        self._trained = torch.empty(blocks.experts + 1, dtype=torch.int32, device=flat.parameters.device)

    def __call__(self, first: Tensor, second: Tensor, figures: Tensor, settings: StepSettings) -> None:
        flat, count = self._flat, len(self._flat.parameters)
        grid = (triton.cdiv(count, STATE_BLOCK * _BLOCKS),)
        if flat.stacks:
            self._trained.zero_()
            self._trained[-1:].fill_(1)
            mark_trained[grid](
                flat.gradients, self._owners, self._trained, count, BLOCK=STATE_BLOCK, BLOCKS=_BLOCKS, num_warps=8
            )
        adamw[grid](
            flat.parameters,
            flat.gradients,
            first,
            second,
            flat.compute,
            self._owners,
            self._trained,
            figures,
            float(settings.learning_rate),
            float(settings.weight_decay),
            float(settings.beta1),
            1.0 - settings.beta1,
            float(settings.beta2),
            1.0 - settings.beta2,
            float(settings.epsilon),
            count,
            STACKS=bool(flat.stacks),
            COPY=flat.compute is not flat.parameters,
            BLOCK=STATE_BLOCK,
            BLOCKS=_BLOCKS,
            num_warps=8,
        )
