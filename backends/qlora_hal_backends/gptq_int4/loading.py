"""The room that differs from the family's: a GPTQ checkpoint's layers, decoded by an engine's kernel."""

from __future__ import annotations

import importlib.metadata
from typing import cast

import torch

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.gptq_int4.engines import (
    Engine,
    GptqSettings,
    Kernel,
    LoadWeight,
    chosen_kernel,
    installed_engine,
    load_function,
)
from qlora_hal_backends.gptq_int4.packed_tensors import PARTS, read_packed, read_settings
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.loading import BaseModel, Checkpoint, load_with, read_and_quantize
from qlora_hal_backends.torch_family.platform import TorchPlatform

_DENSE = Quantization(WeightFormat.NONE)


def load_base(
    platform: TorchPlatform,
    source: ModelSource,
    quantization: Quantization,
    compute: Compute,
    device: torch.device,
) -> BaseModel:
    """Load a GPTQ checkpoint as it is stored. Raises ModelError, UnsupportedFeatureError, ConfigError."""
    settings = checked_settings(source, quantization)
    engine = installed_engine(compute.options.get("engine", "auto"))
    wanted = compute.options.get("kernel", "auto")
    kernel = chosen_kernel(engine, wanted, platform.device, act_order=settings.act_order)
    load_weight = cast(LoadWeight, load_function(engine.load_weight))

    def read_weight(
        checkpoint: Checkpoint, name: str, _: Quantization, dtype: torch.dtype, device: torch.device
    ) -> BaseWeight:
        if not any(checkpoint.has(f"{name}.{part}") for part in PARTS):
            return read_and_quantize(checkpoint, name, _DENSE, dtype, device)  # left out of quantization
        return load_weight(read_packed(checkpoint, name, settings, device), settings, kernel.name, dtype)

    base = load_with(source, quantization, compute, device, read_weight)
    base.decoding, base.versions = _named(engine, kernel)
    return base


def checked_settings(source: ModelSource, quantization: Quantization) -> GptqSettings:
    """How the checkpoint is packed, as far as this backend serves it."""
    stored = source.facts.prequantized
    if stored is None or stored.method != "gptq":
        found = "not quantized" if stored is None else f"quantized with {stored.method}"
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend gptq_int4 loads GPTQ checkpoints; this model is {found}.",
            where=source.name,
            fix="Run qlora-hal quantize first, or let train() do it with quantization.weight_format int4_gptq.",
        )
    settings = read_settings(stored)
    if quantization.block_size is not None and quantization.block_size != settings.group_size:
        raise ConfigError(
            "QH-U11",
            f"{quantization.block_size} was requested; the checkpoint has {settings.group_size or 'one for all'}.",
            where="quantization.block_size",
            fix="Remove quantization.block_size: a quantized checkpoint is used unchanged.",
        )
    heads = [name for name in source.facts.tensors if name.endswith("lm_head.qweight")]
    if heads:
        raise ModelError(
            "QH-C72",
            "The checkpoint's output head is quantized (lm_head); the loss is computed with an unquantized head.",
            where=source.name,
            fix="Choose a checkpoint made with lm_head: false.",
        )
    return settings


def _named(engine: Engine, kernel: Kernel) -> tuple[str, dict[str, str]]:
    version = importlib.metadata.version(engine.distribution)
    return f"{engine.distribution} {version} {kernel.name} dequantize", {engine.distribution: version}
