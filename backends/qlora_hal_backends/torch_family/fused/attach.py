"""Putting the fused schedule on a loaded base with its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_hal.contract.backend import Compute
from qlora_hal_backends.torch_family.attention.causal import (
    CausalAttention,
    FlashVarlen,
    HeadCounts,
    RectangleKernels,
)
from qlora_hal_backends.torch_family.attention.rectangles import proved_rectangles
from qlora_hal_backends.torch_family.attention.varlen import SAMPLE_BY_SAMPLE, UnevenAttention, proved_varlen
from qlora_hal_backends.torch_family.device import device_refusal
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.body import FusedBody, RotaryTables, least_attended
from qlora_hal_backends.torch_family.fused.collecting import layer_weights, make_buffers
from qlora_hal_backends.torch_family.fused.decoder_layer import DecoderLayer
from qlora_hal_backends.torch_family.fused.families import (
    NO_ROTARY,
    Activation,
    activation_of,
    embedding_scale_of,
    epsilon_of,
    family_of,
    head_width_of,
    rotary_kinds,
    rotary_of,
)
from qlora_hal_backends.torch_family.fused.feed_forward import DenseFeedForward, FeedForward
from qlora_hal_backends.torch_family.fused.fp8.kernel_trial import proved_fp8_kernels
from qlora_hal_backends.torch_family.fused.fp8.operations import Fp8Operations
from qlora_hal_backends.torch_family.fused.fp8.products import FP8_WORDS, fp8_rooms
from qlora_hal_backends.torch_family.fused.heads import Heads
from qlora_hal_backends.torch_family.fused.kernel_trial import proved_kernels
from qlora_hal_backends.torch_family.fused.layer_inputs import HostMemory
from qlora_hal_backends.torch_family.fused.layer_weights import LayerWeights, joined_rooms
from qlora_hal_backends.torch_family.fused.mixture.collecting import make_stack_buffers, mixture_weights, router_of
from qlora_hal_backends.torch_family.fused.mixture.feed_forward import HiddenRoom, MixtureFeedForward
from qlora_hal_backends.torch_family.fused.mixture.kernel_trial import proved_mixture_kernels
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations
from qlora_hal_backends.torch_family.fused.mixture.shared import SharedExpert
from qlora_hal_backends.torch_family.fused.mixture.weights import MixtureWeights, StackBuffers
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.fused.stream import Stream
from qlora_hal_backends.torch_family.fused.supported import (
    attention_of,
    experts_refusal,
    fp8_model_refusal,
    model_refusal,
)
from qlora_hal_backends.torch_family.fused.tape import Keep
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.platform import LONG_SAMPLE, MIXTURE_TILE_ROWS, TILE_ROWS
from qlora_hal_backends.torch_family.ranks import most_ranks_here

KEPT: Mapping[str, Keep] = {"selective": Keep.ALL_BUT_GATE_UP, "full": Keep.RESIDUAL, "offload": Keep.RESIDUAL}
"""What layers keep under each `Compute.recompute`."""

KEPT_WORDS = f"attention over {LONG_SAMPLE} tokens and more kept where the host has room"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The model keeps its plain layers; `reason` goes into the run's `kernel_path`."""

    reason: str

    @property
    def words(self) -> str:
        return f"plain layers: {self.reason}"


def try_attach(base: BaseModel, flat: FlatAdapter, compute: Compute, device: torch.device) -> FusedBody | Refusal:
    """The fused body of a base whose adapter is placed, or why it has none."""
    reason = (
        device_refusal(device)
        or model_refusal(base, flat, compute)
        or experts_refusal(base, compute)
        or (fp8_model_refusal(base) if compute.fp8_products else None)
    )
    if reason is not None:
        return Refusal(reason)
    activation = activation_of(base) or Activation.SILU
    try:
        operations = proved_kernels(device, activation)
        mixture = proved_mixture_kernels(device, activation) if base.experts else None
        fp8 = proved_fp8_kernels(device) if compute.fp8_products else None
    except Exception as error:  # Triton compiles here and now: a missing C compiler or driver shows in many classes
        return Refusal(f"the kernels do not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    heads, dtype = _head_counts(base), getattr(torch, compute.dtype)
    uneven, rectangles = proved_varlen(device, heads, dtype), proved_rectangles(device, heads, dtype)
    return attach_with(operations, base, flat, compute, mixture=mixture, uneven=uneven, rectangles=rectangles, fp8=fp8)


def attach_with(
    operations: Operations,
    base: BaseModel,
    flat: FlatAdapter,
    compute: Compute,
    *,
    mixture: MixtureOperations | None = None,
    uneven: UnevenAttention = SAMPLE_BY_SAMPLE,
    rectangles: RectangleKernels | None = None,
    fp8: Fp8Operations | None = None,
    keep: Keep | None = None,
    residual_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
) -> FusedBody:
    """Build the body for a model that `model_refusal` has no word against; `mixture` where it has experts, `fp8` where
    products with the base are in 8-bit floats.

    `keep` follows `compute.recompute`, `residual_dtype` is the compute dtype, and `tile_rows` what the family's
    feed-forward wants, unless given.
    """
    assert operations.activation is activation_of(base), "operations are made for a model's activation"
    recomputes = compute.gradient_checkpointing
    offloads = recomputes and compute.recompute == "offload"
    attention = attention_of(base)
    family, norm = family_of(base), base.body.norm
    like = norm.weight.detach().to(getattr(torch, compute.dtype))
    # The attention of a mixture is little beside its experts: taking turns with them would save nothing.
    shares = recomputes and not base.experts
    make_rooms = partial(joined_rooms, operations) if fp8 is None else partial(fp8_rooms, fp8)
    buffers = make_buffers(list(base.layers), family, flat, like, operations, make_rooms, shared=shares)
    stream = Stream(epsilon_of(norm), operations)
    of_experts: FeedForward | None = None
    experts: list[MixtureWeights | None] = [None for _ in base.layers]
    if base.experts:
        assert mixture is not None, "a mixture has operations of its own"
        shared = DenseFeedForward(buffers, operations, stream, TILE_ROWS, "shared_in", "shared_out")
        routed = [layer for layer in base.layers if family.has_experts(layer)]
        stacks = make_stack_buffers(routed, flat, like, mixture, operations)
        experts = [
            mixture_weights(layer, family, stacks, flat) if family.has_experts(layer) else None for layer in base.layers
        ]
        of_experts = _mixture(routed[0], stacks, shared, mixture, like, tile_rows or MIXTURE_TILE_ROWS)
    schedule = DecoderLayer(
        heads=Heads(_head_counts(base), operations),
        attention_scale=float(attention.scaling),
        attention=CausalAttention(uneven.attention, rectangles),
        buffers=buffers,
        operations=operations,
        stream=stream,
        dense=DenseFeedForward(buffers, operations, stream, tile_rows or TILE_ROWS),
        mixture=of_experts,
    )
    layers = [
        layer_weights(layer, path, family, buffers, flat, of_layer)
        for layer, path, of_layer in zip(base.layers, _paths(base), experts, strict=True)
    ]
    kept = _kept_words(uneven, rectangles, layers) if offloads else ""
    return FusedBody(
        base=base,
        flat=flat,
        schedule=schedule,
        layers=layers,
        final_norm=family.norm_weight(norm),
        rotary_tables=_rotary_tables(base),
        keep=keep or (KEPT[compute.recompute] if recomputes else Keep.PRODUCTS),
        residual_dtype=residual_dtype or like.dtype,
        products_path="" if fp8 is None else FP8_WORDS,
        attention_path=", ".join(filter(None, (uneven.words, kept))),
        embedding_scale=embedding_scale_of(base),
        host=HostMemory(like.device, ranks=most_ranks_here(compute.world, like.device)) if offloads else None,
    )


def _kept_words(uneven: UnevenAttention, rectangles: RectangleKernels | None, layers: Sequence[LayerWeights]) -> str:
    """Which attention gives what can wait, where that is over so many tokens that it is ever worth it."""
    of_packed, of_others = isinstance(uneven.attention, FlashVarlen), rectangles is not None
    if least_attended(layers, LONG_SAMPLE) < LONG_SAMPLE or not (of_packed or of_others):
        return ""
    if of_packed and of_others:
        return KEPT_WORDS
    return f"of {'packed rows' if of_packed else 'rows that are not packed'} {KEPT_WORDS}"


def _mixture(
    layer: Any,
    stacks: StackBuffers,
    shared: DenseFeedForward,
    mixture: MixtureOperations,
    like: Tensor,
    tile_rows: int,
) -> MixtureFeedForward:
    """`layer` is one of those with experts, `shared` of the expert that every token goes to, where there is one."""
    router = router_of(layer)
    assert router is not None, "`supported` refuses other routers"
    has_shared = shared.into in shared.buffers.groups
    return MixtureFeedForward(
        router=router,
        buffers=stacks,
        operations=shared.operations,
        mixture=mixture,
        stream=shared.stream,
        tile_rows=tile_rows,
        gradient_room=shared.gradient_room if has_shared else HiddenRoom(stacks.into.columns, like),
        shared=SharedExpert(shared, mixture) if has_shared else None,
    )


def _head_counts(base: BaseModel) -> HeadCounts:
    config, size = base.causal.config.get_text_config(), head_width_of(base)
    return HeadCounts(int(config.num_attention_heads), int(config.num_key_value_heads), size)


def _paths(base: BaseModel) -> list[str]:
    """The module path of each decoder layer, as the adapter's names have it."""
    by_linear = {linear: path for path, linear in base.linears.items()}
    layers: Any = base.layers
    return [by_linear[layer.self_attn.o_proj].removesuffix(".self_attn.o_proj") for layer in layers]


def _rotary_tables(base: BaseModel) -> RotaryTables:
    device = next(base.body.rotary_emb.buffers()).device
    layers: Any = base.layers
    some_have_none = any(rotary_of(layer.self_attn) == NO_ROTARY for layer in layers)

    def tables(time: int) -> Mapping[str, tuple[Tensor, Tensor]]:
        found = {name: halves(time, {"layer_type": name} if name else {}) for name in rotary_kinds(base)}
        cos, sin = next(iter(found.values()))
        return {**found, NO_ROTARY: (torch.ones_like(cos), torch.zeros_like(sin))} if some_have_none else found

    def halves(time: int, of: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """cos and sin `[time, d / 2]` in float32: the model repeats each angle for both halves of a head."""
        positions = torch.arange(time, device=device)[None]
        cos, sin = base.body.rotary_emb(torch.empty(1, device=device), position_ids=positions, **of)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return tables
