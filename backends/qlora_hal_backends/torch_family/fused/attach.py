"""Putting the fused schedule on a loaded base with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_hal.contract.backend import Compute
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.body import FusedBody, RotaryTables
from qlora_hal_backends.torch_family.fused.collecting import layer_weights, make_buffers
from qlora_hal_backends.torch_family.fused.decoder_layer import DecoderLayer
from qlora_hal_backends.torch_family.fused.layer_inputs import HostMemory
from qlora_hal_backends.torch_family.fused.operations import HeadCounts, Operations
from qlora_hal_backends.torch_family.fused.supported import (
    attention_of,
    device_refusal,
    longest_without_window,
    model_refusal,
)
from qlora_hal_backends.torch_family.fused.tape import Keep
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.platform import TILE_ROWS

KEPT: Mapping[str, Keep] = {"selective": Keep.ALL_BUT_GATE_UP, "full": Keep.RESIDUAL, "offload": Keep.RESIDUAL}
"""What layers keep under each `Compute.recompute`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The model keeps its plain layers; `reason` goes into the run's `kernel_path`."""

    reason: str


def try_attach(base: BaseModel, flat: FlatAdapter, compute: Compute, device: torch.device) -> FusedBody | Refusal:
    """The fused body of a base whose adapter is placed, or why it has none."""
    reason = device_refusal(device) or model_refusal(base, flat, compute)
    if reason is not None:
        return Refusal(reason)
    try:
        operations = _proved_kernels(device)
    except Exception as error:  # Triton compiles here and now: a missing C compiler or driver shows in many classes
        return Refusal(f"the kernels do not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    return attach_with(operations, base, flat, compute)


def _proved_kernels(device: torch.device) -> Operations:
    """Triton's operations, after one of them has computed what the reference does. Raises whatever Triton raises."""
    from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
    from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations

    gate_up = torch.linspace(-4, 4, 8 * 64, device=device).view(8, 64)
    found, expected = gate_up.new_empty(8, 32), gate_up.new_empty(8, 32)
    TritonOperations().swiglu(gate_up, found)
    ReferenceOperations().swiglu(gate_up, expected)
    if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        raise ArithmeticError("a kernel computed something else than torch")
    return TritonOperations()


def attach_with(
    operations: Operations,
    base: BaseModel,
    flat: FlatAdapter,
    compute: Compute,
    *,
    keep: Keep | None = None,
    residual_dtype: torch.dtype | None = None,
    tile_rows: int = TILE_ROWS,
) -> FusedBody:
    """Build the body for a model that `model_refusal` has no word against.

    `keep` follows `compute.recompute`, and `residual_dtype` is the compute dtype, unless given.
    """
    recomputes = compute.gradient_checkpointing
    attention = attention_of(base)
    norm = base.body.norm
    like = norm.weight.detach().to(getattr(torch, compute.dtype))
    buffers = make_buffers(list(base.layers), flat, like, operations, shared=recomputes)
    schedule = DecoderLayer(
        heads=_head_counts(base),
        epsilon=float(norm.variance_epsilon),
        attention_scale=float(attention.scaling),
        buffers=buffers,
        operations=operations,
        tile_rows=tile_rows,
    )
    return FusedBody(
        base=base,
        flat=flat,
        schedule=schedule,
        layers=[
            layer_weights(layer, path, buffers, flat) for layer, path in zip(base.layers, _paths(base), strict=True)
        ],
        final_norm=norm.weight.detach(),
        rotary_tables=_rotary_tables(base),
        keep=keep or (KEPT[compute.recompute] if recomputes else Keep.PRODUCTS),
        residual_dtype=residual_dtype or like.dtype,
        longest=longest_without_window(base),
        host=HostMemory(like.device) if recomputes and compute.recompute == "offload" else None,
    )


def _head_counts(base: BaseModel) -> HeadCounts:
    attention = attention_of(base)
    size = int(attention.head_dim)
    return HeadCounts(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size)


def _paths(base: BaseModel) -> list[str]:
    """The module path of each decoder layer, as the adapter's names have it."""
    by_linear = {linear: path for path, linear in base.linears.items()}
    layers: Any = base.layers
    return [by_linear[layer.self_attn.q_proj].removesuffix(".self_attn.q_proj") for layer in layers]


def _rotary_tables(base: BaseModel) -> RotaryTables:
    def tables(time: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[time, d / 2]` in float32: the model repeats each angle for both halves of a head."""
        rotary = base.body.rotary_emb
        device = rotary.inv_freq.device
        cos, sin = rotary(torch.empty(1, device=device), position_ids=torch.arange(time, device=device)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return tables
