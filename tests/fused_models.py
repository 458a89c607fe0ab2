"""Tiny real models under a fused schedule, with adapters, batches and the plain layers beside them. Tests only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tiny_models import write_model
from torch import Tensor
from trainers import moved_adapter, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal_backends.torch_family import loading, step
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.families import activation_of
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.fused.supported import model_refusal
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with the window of others": {"sliding_window": 5, "use_sliding_window": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"head_dim": 16, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "smollm3 of kinds alone": {  # transformers' mask heeds them, whatever `use_sliding_window` says
        "no_rope_layers": [1, 0],
        "pad_token_id": 0,
        "sliding_window": 8,
        "use_sliding_window": False,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "seed_oss": {"head_dim": 16},
    "cwm": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": {"pad_token_id": 0, "sliding_window": 8},
    "phi3 of parts of heads": {"pad_token_id": 0, "partial_rotary_factor": 0.5},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
# Two float32 schedules of a two-layer model differ by rounding in other orders: 2^-24 for each of some hundred terms.
SAME_FUNCTION = 1e-5


@dataclass
class Model:
    """A loaded base with an adapter whose B is not zero."""

    base: loading.BaseModel
    flat: FlatAdapter
    compute: Compute

    def gradient(self, loss: step.BatchLoss | Callable[..., Tensor], *batches: Batch) -> tuple[float, Tensor]:
        self.flat.gradients.zero_()
        total = 0.0
        for batch in batches:
            value = loss(step.to_device(batch, DEVICE), 1 / 40)
            value.backward()
            total += value.item()
        return total, self.flat.gradients.clone()

    def plain(self, batch: step.DeviceBatch, scale: float) -> Tensor:
        return step.batch_loss(self.base, batch, scale)


def load(
    folder: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    weight_format: WeightFormat = WeightFormat.NF4,
    targets: Callable[[str], bool] = lambda module: True,
    r: int = 4,
    dropout: float = 0.0,
    changes: Mapping[str, object] | None = None,
    **options: object,
) -> Model:
    path = write_model(folder, family.partition(" ")[0], **(changes or FAMILIES.get(family, {})))
    four_bit = weight_format is WeightFormat.NF4
    compute = Compute(dtype, False, options)  # type: ignore[arg-type]
    quantization = Quantization(weight_format, 64 if four_bit else None, four_bit)
    with torch.no_grad():
        base = loading.load_base(source_of(path), quantization, compute, DEVICE)
    shapes = {name: linear.shape for name, linear in base.linears.items()}
    config = AdapterConfig(r, 2.0 * r, dropout, False, tuple(sorted(filter(targets, shapes))))
    flat = FlatAdapter.place(moved_adapter(config, shapes), base.linears, getattr(torch, dtype), DEVICE)
    return Model(base, flat, compute)


def with_fused_layers(trainer: TorchLoRATrainer, tile_rows: int = 15) -> TorchLoRATrainer:
    """A trainer whose layers are scheduled as on a GPU, with plain torch in place of the kernels."""
    assert trainer._flat is not None
    trainer._fused = attach_in_torch(trainer._loaded, trainer._flat, trainer._compute, tile_rows=tile_rows)
    return trainer


def attach_in_torch(
    base: loading.BaseModel,
    flat: FlatAdapter,
    compute: Compute,
    device: torch.device = DEVICE,
    *,
    tile_rows: int | None = None,
) -> FusedBody:
    """`fused.try_attach` with plain torch in place of the kernels, whatever the device and the dtype."""
    refusal, activation = model_refusal(base, flat, compute), activation_of(base)
    assert refusal is None, refusal
    assert activation is not None
    mixture = ReferenceMixture(activation) if base.experts else None
    return attach_with(ReferenceOperations(activation), base, flat, compute, mixture=mixture, tile_rows=tile_rows)


def packed(batch: Batch) -> Batch:
    """Two samples in each row."""
    half = batch.input_ids.shape[1] // 2
    positions, segments, labels = batch.position_ids.copy(), batch.segment_ids.copy(), batch.labels.copy()
    segments[:, half:] = np.where(segments[:, half:] > 0, 2, 0)
    positions[:, half:] = np.where(segments[:, half:] > 0, positions[:, half:] - half, 0)
    labels[:, half] = -100
    return replace(batch, position_ids=positions, segment_ids=segments, labels=labels)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
