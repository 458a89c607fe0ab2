"""From the experts of transformers' blocks and the flat adapter to the weights and buffers of the fused layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal_backends.torch_family.experts import ExpertStack, TiesByNumber
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.collecting import Entry, group_shape, on_device
from qlora_hal_backends.torch_family.fused.families import LayerFamily
from qlora_hal_backends.torch_family.fused.layer_weights import GroupShape
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations, Router, Scores
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.mixture.weights import (
    MixtureWeights,
    StackBuffer,
    StackBuffers,
    StackWeights,
)
from qlora_hal_backends.torch_family.fused.operations import Operations

HALVES = (("gate", "up"), ("down",))
"""The stacks of a block by group."""
TRIAL_ROWS = 64
SAME_WEIGHT = 2e-6
"""Relative, of float32: exponentials and their sum in another order."""


def router_of(layer: Any) -> Router | None:
    """By what it computes, in its own dtype: where a block finds its experts differs between versions and families.
    None: none of those that `Router` describes."""
    weight, correction = getattr(layer.mlp.gate, "weight", None), correction_of(layer)
    if weight is None or weight.dim() != 2:
        return None
    x = torch.randn(TRIAL_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    found = _choice_of(layer.mlp, x)
    if found is None:
        return None
    weights, experts = found
    # A score that another kernel makes may be rounded to the neighbour.
    close = max(SAME_WEIGHT, torch.finfo(weights.dtype).eps)
    find = _softmax_routers if correction is None else _corrected_routers
    for router in find(layer, experts.shape[1], weights.dtype):
        dtype = torch.float32 if router.exact_logits else weight.dtype
        logits = torch.nn.functional.linear(x.to(dtype), weight.detach().to(dtype))
        expected, chosen = ReferenceMixture().route(logits, correction, router)
        if torch.equal(chosen.long(), experts) and torch.allclose(weights, expected, rtol=close, atol=0.0):
            return router
    return None


def _softmax_routers(layer: Any, each: int, dtype: torch.dtype) -> Iterator[Router]:
    for exact_logits, normalizes in product((False, True), (True, False)):
        yield Router(each, normalizes, dtype, exact_logits=exact_logits)


def _corrected_routers(layer: Any, each: int, dtype: torch.dtype) -> Iterator[Router]:
    """With the numbers of config.json, which a few rows may not show."""
    config = layer.self_attn.config
    groups, kept, factor = config.n_group, config.topk_group, float(config.routed_scaling_factor)
    if each > kept * (len(layer.mlp.gate.weight) // groups):
        return  # what is chosen then lies in no group that counts
    for exact_logits, normalizes in product((False, True), (True, False)):
        yield Router(each, normalizes, dtype, Scores.SIGMOID, factor, groups, kept, exact_logits)


def _choice_of(block: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(weights, experts), each `[rows, k]`, for the rows of x: what its router gives, or the block makes of that."""
    with torch.no_grad(), TiesByNumber():
        found = block.gate(x)
        if not isinstance(found, tuple):  # GLM-4 MoE of transformers 5.10
            found = (found, *_given_to_experts(block, x))
    if len(found) != 3 or found[1].shape != found[2].shape:
        return None
    _, weights, experts = found
    return weights, experts


class _GivenError(Exception):
    """Raised where experts would compute."""


def _given_to_experts(block: Any, x: Tensor) -> list[Tensor]:
    """The weights and the numbers that a block hands to its experts."""
    given: list[Tensor] = []

    def keep(_: object, arguments: tuple[Tensor, ...]) -> None:
        given.extend(reversed(arguments[1:]))
        raise _GivenError

    hook = block.experts.register_forward_pre_hook(keep)
    try:
        with suppress(_GivenError):
            block(x[None])
    finally:
        hook.remove()
    return given


def correction_of(layer: Any) -> Tensor | None:
    correction = getattr(layer.mlp.gate, "e_score_correction_bias", None)
    return None if correction is None else correction.detach().float()


def make_stack_buffers(
    layers: Sequence[Any], flat: FlatAdapter, like: Tensor, mixture: MixtureOperations, operations: Operations
) -> StackBuffers:
    """For layers of one shape. A projection that any layer adapts has its ranks in every layer."""
    blocks = [layer.mlp.experts for layer in layers]
    into, out = (_shape_of(blocks, halves, flat) for halves in HALVES)
    return StackBuffers(into, out, blocks[0].experts, flat, like, mixture, operations)


def _shape_of(blocks: Sequence[Any], halves: Sequence[str], flat: FlatAdapter) -> GroupShape:
    stacks = [[getattr(block, half) for block in blocks] for half in halves]
    adapted = [any(stack.name in flat.adapter.config.target_modules for stack in of_half) for of_half in stacks]
    return group_shape(halves, [of_half[0].shape for of_half in stacks], adapted, flat.adapter.config.r)


def mixture_weights(layer: Any, family: LayerFamily, buffers: StackBuffers, flat: FlatAdapter) -> MixtureWeights:
    block = layer.mlp.experts
    groups = [
        (buffer, [getattr(block, slot.module) for slot in buffer.slots]) for buffer in (buffers.into, buffers.out)
    ]
    entries = [entry for buffer, stacks in groups for entry in _placements(buffer, stacks, flat)]
    into, out = (_stack_weights(buffer, stacks, flat) for buffer, stacks in groups)
    assert family.experts is not None, "the layer has experts"
    gate = family.experts.shared_gate
    return MixtureWeights(
        router=layer.mlp.gate.weight.detach(),
        correction=correction_of(layer),
        shared_gate=None if gate is None else layer.get_submodule(gate).weight.detach(),
        into=into,
        out=out,
        adapter=on_device(entries, flat.compute.device),
    )


def _placements(buffer: StackBuffer, stacks: Sequence[ExpertStack], flat: FlatAdapter) -> Iterator[Entry]:
    """A and B of each expert; zeros where other layers adapt a projection and this one does not."""
    for slot, stack in zip(buffer.slots, stacks, strict=True):
        if slot.rank is None:
            continue
        sides = ((lora_a_key, buffer.a[:, slot.rank]), (lora_b_key, buffer.b[:, slot.rows, slot.rank]))
        for key, target in sides:
            name = key(stack.name)
            source = flat.view(flat.compute, name) if name in flat.slices else None
            experts, rows, columns = target.shape
            for expert in range(experts):
                start = -1 if source is None else int(source.storage_offset()) + expert * source.stride(0)
                place = int(target.storage_offset()) + expert * target.stride(0)
                yield start, place, rows, columns, target.stride(1)


def _stack_weights(buffer: StackBuffer, stacks: Sequence[ExpertStack], flat: FlatAdapter) -> StackWeights:
    a_gradients: list[tuple[Tensor, slice]] = []
    b_gradients: list[tuple[Tensor, slice, slice]] = []
    bases = []
    for slot, stack in zip(buffer.slots, stacks, strict=True):
        assert stack.base is not None, "the base is loaded before an adapter is attached"
        bases.append(stack.base)
        a, b = lora_a_key(stack.name), lora_b_key(stack.name)
        if slot.rank is not None and a in flat.slices:
            a_gradients.append((flat.view(flat.gradients, a), slot.rank))
            b_gradients.append((flat.view(flat.gradients, b), slot.rows, slot.rank))
    return StackWeights(bases, a_gradients, b_gradients)
