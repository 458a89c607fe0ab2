"""Which models the fused step serves. The question is asked once, when an adapter is attached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import LinearShape
from qlora_hal.detect.gpu_dtypes import lacking_dtype
from qlora_hal_backends.torch_family.base_weights import Blockwise4BitWeight
from qlora_hal_backends.torch_family.device import device_refusal
from qlora_hal_backends.torch_family.experts import GroupedProducts, RoutedExperts
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.families import (
    FAMILIES,
    Experts,
    activation_of,
    family_of,
    head_width_of,
    rotary_kinds,
)
from qlora_hal_backends.torch_family.fused.mixture.collecting import router_of
from qlora_hal_backends.torch_family.layer_slots import kind_of
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear

STATIC_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary kinds whose angles do not depend on the length of the batch."""

GROUPED_DTYPE = "bfloat16"
"""What torch's grouped products are fast in."""

WIDTH_MULTIPLE = 16
"""Of every matrix dimension: rows must start at multiples of 16 bytes in each dtype."""


def fp8_device_refusal(device: torch.device) -> str | None:
    """Why this device has no products in 8-bit floats, or None; what it computes with them is still to be proved."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{'AMD GPUs' if device.type == 'cuda' else device.type} have none here"
    if lacking := lacking_dtype("fp8", torch.cuda.get_device_capability(device)):
        return f"the device is of {lacking}"
    return device_refusal(device)


def fp8_model_refusal(base: BaseModel) -> str | None:
    """Why a model that the fused schedule serves has no products in 8-bit floats, or None."""
    if base.experts:
        return "products of routed experts are in bfloat16 alone"
    kinds = [kind_of(linear.base) for linear in base.linears.values() if isinstance(linear, FrozenLinear)]
    others = {kind.__name__ for kind in kinds if kind is not Blockwise4BitWeight}
    return f"the base is of {', '.join(sorted(others))}, not of nf4 or fp4" if others else None


def model_refusal(base: BaseModel, flat: FlatAdapter, compute: Compute) -> str | None:
    """Why this model keeps its plain layers, or None. The first reason found is given."""
    return next(_refusals(base, flat, compute), None)


def _refusals(base: BaseModel, flat: FlatAdapter, compute: Compute) -> Iterator[str]:
    kinds = {type(layer).__name__ for layer in base.layers}
    if (
        len(kinds) != 1
        or not kinds <= FAMILIES.keys()
        or type(base.body).__module__.partition(".")[0] != "transformers"
    ):
        yield f"layers of type {', '.join(sorted(kinds))} are not in the fused schedule"
        return
    if base.head is None:
        yield "logits that only the architecture itself can make"
    if (experts := family_of(base).experts) is not None:
        yield from _mixture_refusals(base, experts)
    config = base.causal.config.get_text_config()
    if activation_of(base) is None:
        yield "a feed-forward activation other than SiLU and GELU by tanh"
    if getattr(attention_of(base), "attn_logit_softcapping", None) is not None:
        yield f"attention scores capped at {config.attn_logit_softcapping}"
    if not attention_of(base).is_causal:
        yield "attention that is not causal"
    if compute.options.get("attention") == "eager":
        yield "backend.options.attention is eager"
    if compute.options.get("layers") == "plain":
        yield "backend.options.layers is plain"
    yield from _rotary_refusals(base)
    yield from _linear_refusals(base, flat)


def _rotary_refusals(base: BaseModel) -> Iterator[str]:
    if hasattr(base.body, "rotary_emb_local"):
        yield "two rotary embeddings, as transformers 4 keeps them"
    size = head_width_of(base)
    for kind in rotary_kinds(base).values():
        if kind not in STATIC_ROTARY:
            yield f"rotary embedding of kind {kind}"
    if size % WIDTH_MULTIPLE:
        yield f"head size {size} is not a multiple of {WIDTH_MULTIPLE}"


def experts_refusal(base: BaseModel, compute: Compute) -> str | None:
    """Why the products of experts cannot be grouped here, or None."""
    products = [block.products for block in base.experts]
    if not all(isinstance(each, GroupedProducts) for each in products):
        return products[0].words
    if products and compute.dtype != GROUPED_DTYPE:
        return f"experts one by one in {compute.dtype}"
    return None


def _mixture_refusals(base: BaseModel, experts: Experts) -> Iterator[str]:
    layers: Any = base.layers
    found: list[Any] = [getattr(layer, "mlp", None) for layer in layers]
    others = {type(mlp).__name__ for mlp in found if mlp is not None} - {experts.block, experts.dense}
    if others:
        yield f"feed-forwards of type {', '.join(sorted(others))} among those of experts"
    routed = [layer for layer, mlp in zip(layers, found, strict=True) if type(mlp).__name__ != experts.dense]
    blocks: list[Any] = [getattr(layer, "mlp", None) for layer in routed]
    if not all(isinstance(getattr(block, "experts", None), RoutedExperts) for block in blocks):
        yield "experts that are not stacked, as transformers 4 keeps them"
        return
    if any(block.experts.has_biases for block in blocks):
        yield "experts with biases"
    gate = experts.shared_gate
    if gate is not None and any(layer.get_submodule(gate).bias is not None for layer in routed):
        yield "a gate of the shared expert with a bias"
    if routed and router_of(routed[0]) is None:
        yield "a router that is none of those described (`Router`)"


def _linear_refusals(base: BaseModel, flat: FlatAdapter) -> Iterator[str]:
    family = family_of(base)
    layers: Any = base.layers
    shapes: dict[str, set[tuple[LinearShape, ...]]] = defaultdict(set)
    paths = {linear: path for path, linear in base.linears.items()}
    known: set[str] = set()
    for layer in layers:
        groups = {
            name: [layer.get_submodule(module) for module in modules]
            for name, modules in family.groups_of(layer).items()
        }
        if not all(
            isinstance(linear, FrozenLinear) and linear.base is not None
            for linears in groups.values()
            for linear in linears
        ):
            yield "a projection that is not a frozen linear layer"
            return
        if family.has_experts(layer):
            groups["experts"] = layer.mlp.experts.stacks
        for name, linears in groups.items():
            shapes[name].add(tuple(linear.shape for linear in linears))
            known.update(paths[linear] for linear in linears)
    if any(len(of_group) != 1 for of_group in shapes.values()):
        yield "layers of different shapes"
    widths = {
        width
        for of_group in shapes.values()
        for linears in of_group
        for shape in linears
        for width in (shape.inputs, shape.outputs)
    }
    if any(width % WIDTH_MULTIPLE for width in widths):
        yield f"a width that is not a multiple of {WIDTH_MULTIPLE}"
    outside = sorted(set(flat.adapter.config.target_modules) - known)
    if outside:
        yield f"an adapter outside the decoder layers ({outside[0]})"


def attention_of(base: BaseModel) -> Any:
    """The attention module of the first layer; the layers are of one shape."""
    layers: Any = base.layers
    return layers[0].self_attn
