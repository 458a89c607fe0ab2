"""From transformers' modules and the flat adapter to the weights and buffers of the fused layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_hal.contract.values import LinearShape
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.families import LayerFamily, epsilon_of, rotary_of
from qlora_hal_backends.torch_family.fused.layer_weights import (
    RANK_MULTIPLE,
    GroupBuffer,
    GroupShape,
    GroupWeights,
    Join,
    JointNorm,
    LayerBuffers,
    LayerWeights,
    MakeRooms,
    Slot,
)
from qlora_hal_backends.torch_family.fused.mixture.weights import MixtureWeights
from qlora_hal_backends.torch_family.fused.operations import HeadNorm, Operations, Placements
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear

Entry = tuple[int, int, int, int, int]
"""See `operations.Placements`."""


def make_buffers(
    layers: Sequence[Any],
    family: LayerFamily,
    flat: FlatAdapter,
    like: Tensor,
    operations: Operations,
    make_rooms: MakeRooms,
    *,
    shared: bool = False,
) -> LayerBuffers:
    """Buffers for groups that are of one shape in all layers that have them, in rooms of `shared` memory or apart. A
    projection that any layer adapts has its ranks in every layer."""
    adapted = flat.adapter.config.target_modules
    found = {name: (layer, modules) for layer in layers for name, modules in family.groups_of(layer).items()}
    shapes = {}
    for name, (layer, modules) in found.items():
        linear_shapes = [linear_of(layer, module).shape for module in modules]
        anywhere = [any(path.endswith(f".{module}") for path in adapted) for module in modules]
        shapes[name] = group_shape(modules, linear_shapes, anywhere, flat.adapter.config.r)
    return LayerBuffers(shapes, flat, like, operations, make_rooms, shared=shared)


def group_shape(modules: Sequence[str], shapes: Sequence[LinearShape], adapted: Sequence[bool], r: int) -> GroupShape:
    slots: list[Slot] = []
    row = ranks = 0
    for module, shape, has_rank in zip(modules, shapes, adapted, strict=True):
        rank = slice(ranks, ranks + r) if has_rank else None
        slots.append(Slot(module, slice(row, row + shape.outputs), rank))
        row += shape.outputs
        ranks += r if has_rank else 0
    return GroupShape(slots, shapes[0].inputs, -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE)


def layer_weights(
    layer: Any,
    path: str,
    family: LayerFamily,
    buffers: LayerBuffers,
    flat: FlatAdapter,
    experts: MixtureWeights | None = None,
) -> LayerWeights:
    """Collect one layer. `path` is its module path, as the adapter names it."""
    attention = layer.self_attn
    groups = {name: buffers.groups[name] for name in family.groups_of(layer)}
    entries = {name: _group_placements(buffer, path, flat) for name, buffer in groups.items()}
    return LayerWeights(
        input_norm=family.norm_weight(layer.input_layernorm),
        middle_norm=family.norm_weight(getattr(layer, family.middle_norm)),
        head_norm=_head_norm(attention, family),
        joint_norm=_joint_norm(attention, family),
        window=family.window_of(attention),
        rotary=rotary_of(attention),
        attention_join=_join(layer, family, family.attention_norm),
        feed_forward_join=_join(layer, family, family.feed_forward_norm),
        groups={
            name: _group_weights(
                layer, path, buffer, flat, on_device([*_zeros_around(buffer), *entries[name]], flat.compute.device)
            )
            for name, buffer in groups.items()
        },
        adapter=on_device([entry for part in entries.values() for entry in part], flat.compute.device),
        experts=experts,
    )


def _head_norm(attention: Any, family: LayerFamily) -> HeadNorm | None:
    if family.norms_heads_jointly or not hasattr(attention, "q_norm"):
        return None
    weights = torch.stack((family.norm_weight(attention.q_norm), family.norm_weight(attention.k_norm)))
    return HeadNorm(weights, epsilon_of(attention.q_norm))


def _joint_norm(attention: Any, family: LayerFamily) -> JointNorm | None:
    if not family.norms_heads_jointly:
        return None
    query, key, limit = attention.q_norm, attention.k_norm, attention.config.clip_qkv
    weights = family.norm_weight(query), family.norm_weight(key)
    return JointNorm(*weights, epsilon_of(query), None if limit is None else float(limit))


def _join(layer: Any, family: LayerFamily, norm: str | None) -> Join | None:
    if norm is not None:
        return Join(family.norm_weight(getattr(layer, norm)), 1.0)
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    return None if scale == 1.0 else Join(None, scale)


def on_device(entries: Sequence[Entry], device: torch.device) -> Placements:
    return Placements(entries, torch.tensor(entries, dtype=torch.int64).to(device))


def _group_placements(buffer: GroupBuffer, path: str, flat: FlatAdapter) -> list[Entry]:
    return [entry for slot in buffer.slots if slot.rank is not None for entry in _placements(buffer, slot, path, flat)]


def _zeros_around(buffer: GroupBuffer) -> Iterator[Entry]:
    """What no adapter of the group fills and its products read: B off its diagonal blocks, and the padded ranks."""
    used = max((slot.rank.stop for slot in buffer.slots if slot.rank is not None), default=0)
    empty = [buffer.a[used:]]
    for slot in buffer.slots:
        rows = buffer.b[slot.rows]
        empty += [rows] if slot.rank is None else [rows[:, : slot.rank.start], rows[:, slot.rank.stop :]]
    for target in empty:
        if target.numel():
            yield -1, int(target.storage_offset()), target.shape[0], target.shape[1], target.stride(0)


def _placements(buffer: GroupBuffer, slot: Slot, path: str, flat: FlatAdapter) -> Iterator[Entry]:
    """A and B of one projection; zeros where other layers adapt it and this one does not."""
    targets = (buffer.a[slot.rank], buffer.b[slot.rows, slot.rank])
    for name, target in zip(_tensor_names(path, slot), targets, strict=True):
        start = flat.slices[name][0] if name in flat.slices else -1
        yield start, int(target.storage_offset()), target.shape[0], target.shape[1], target.stride(0)


def _tensor_names(path: str, slot: Slot) -> tuple[str, str]:
    prefix = f"base_model.model.{path}.{slot.module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _group_weights(layer: Any, path: str, buffer: GroupBuffer, flat: FlatAdapter, adapter: Placements) -> GroupWeights:
    linears = [linear_of(layer, slot.module) for slot in buffer.slots]
    a_gradients: list[tuple[Tensor, slice]] = []
    b_gradients: list[tuple[Tensor, slice, slice]] = []
    for slot in buffer.slots:
        a, b = _tensor_names(path, slot)
        if slot.rank is not None and a in flat.slices:
            a_gradients.append((flat.view(flat.gradients, a), slot.rank))
            b_gradients.append((flat.view(flat.gradients, b), slot.rows, slot.rank))
    return GroupWeights(
        rows=buffer.rows,
        bases=[_base_of(linear) for linear in linears],
        bias=_group_bias(linears, buffer.b),
        adapter=adapter,
        a_gradients=a_gradients,
        b_gradients=b_gradients,
        channels=_channel_words(linears, buffer, flat),
        rank=flat.adapter.config.r,
    )


def _channel_words(linears: Sequence[FrozenLinear], buffer: GroupBuffer, flat: FlatAdapter) -> Tensor | None:
    """Zeros for a projection that this layer does not adapt: its A and B are zeros, too."""
    if not flat.adapter.config.dropout or not buffer.adapted:
        return None
    nothing = torch.zeros(buffer.columns, dtype=torch.int32, device=flat.compute.device)
    words = [
        nothing if linear.lora is None or linear.lora.channel_words is None else linear.lora.channel_words
        for linear, slot in zip(linears, buffer.slots, strict=True)
        if slot.rank is not None
    ]
    return torch.stack(words)


def _group_bias(linears: Sequence[FrozenLinear], like: Tensor) -> Tensor | None:
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    widths = [linear.out_features for linear in linears]
    return torch.cat(
        [like.new_zeros(width) if bias is None else bias for bias, width in zip(biases, widths, strict=True)]
    )


def linear_of(layer: Any, module: str) -> FrozenLinear:
    linear = layer.get_submodule(module)
    assert isinstance(linear, FrozenLinear), f"{module} was checked when the layer was accepted"
    return linear


def _base_of(linear: FrozenLinear) -> BaseWeight:
    assert linear.base is not None, "the base is loaded before an adapter is attached"
    return linear.base
