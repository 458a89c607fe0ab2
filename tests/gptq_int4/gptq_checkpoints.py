"""GPTQ checkpoints of every kind, packed by the oracle's codec. Tests only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.model.source import ModelSource, resolve_model
from qlora_hal_oracle import (
    GptqGrid,
    GptqWeight,
    ZeroPointConvention,
    dequantize_gptq,
    min_max_grid,
    pack_gptq,
    round_to_grid,
)
from qlora_hal_oracle.arrays import Float32, Float64, Int32
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, linear_shapes, write_config, write_safetensors

V1, V2 = ZeroPointConvention.V1, ZeroPointConvention.V2
SHAPE = SHAPES[0]
_SAFE = {"float32": "F32", "float16": "F16", "int32": "I32"}


@dataclass(frozen=True)
class Kind:
    """One way to pack. `group_size` -1: one group over all inputs."""

    group_size: int = 64
    symmetric: bool = True
    act_order: bool = False
    convention: ZeroPointConvention = V1
    bits: int = 4

    def __str__(self) -> str:
        words = [f"{self.bits}bit", str(self.group_size), "sym" if self.symmetric else "asym", self.convention.value]
        return "-".join([*words, *(["act_order"] if self.act_order else [])])

    @property
    def described(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": self.convention.value,
        }


KINDS = tuple(
    Kind(size, symmetric, act_order, convention)
    for size in (32, 64, 128, -1)
    for symmetric in (True, False)
    for act_order in (False, True)
    for convention in (V1, V2)
) + tuple(
    Kind(64, symmetric, act_order, convention, bits=8)
    for symmetric, act_order, convention in ((True, False, V1), (False, True, V2), (False, False, V1))
)


def packed(weight: Float32, kind: Kind, seed: int = 0) -> GptqWeight:
    inputs = weight.shape[1]
    groups: Int32 = (np.arange(inputs) // (kind.group_size if kind.group_size > 0 else inputs)).astype(np.int32)
    if kind.act_order:
        groups = np.random.default_rng(seed).permutation(groups)
    grid = min_max_grid(weight, groups, bits=kind.bits, symmetric=kind.symmetric)
    if kind.convention is V1 and not kind.symmetric:
        grid = GptqGrid(grid.steps, np.maximum(grid.zeros, 1))  # v1 cannot hold a zero point of 0
    codes = round_to_grid(weight, grid, groups, bits=kind.bits)
    return pack_gptq(codes, grid, groups, bits=kind.bits, convention=kind.convention)


def parts(stored: GptqWeight) -> dict[str, np.ndarray[Any, Any]]:
    return {name: getattr(stored, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def write_checkpoint(
    folder: Path,
    kind: Kind,
    *,
    weights_file: str = "model.safetensors",
    config_file: str = "config.json",
    described: dict[str, Any] | None = None,
    changed: dict[str, np.ndarray[Any, Any] | None] | None = None,
) -> dict[str, Float64]:
    """A tiny Llama with packed layers; what each decodes to. `changed` replaces or (None) drops single tensors."""
    tensors = draw_tensors(SHAPE, np.random.default_rng(5))
    linears = linear_shapes(SHAPE)
    arrays: dict[str, Any] = {n: t for n, t in tensors.items() if n.removesuffix(".weight") not in linears}
    decoded = {}
    for module in linears:
        stored = packed(tensors[f"{module}.weight"], kind)
        arrays |= {f"{module}.{name}": part for name, part in parts(stored).items()}
        decoded[module] = dequantize_gptq(stored)
    for name, array in (changed or {}).items():
        arrays.pop(name, None)
        if array is not None:
            arrays[name] = array
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / weights_file, {n: (_SAFE[a.dtype.name], a) for n, a in arrays.items()})
    told = kind.described if described is None else described
    in_config = config_file == "config.json"
    write_config(folder, SHAPE, more={"quantization_config": told} if in_config else None)
    if not in_config:
        (folder / config_file).write_text(json.dumps(told))
    return decoded


def source_of(folder: Path) -> ModelSource:
    return resolve_model(str(folder), revision=None, trust_remote_code=False)


def storage_of(source: ModelSource) -> Quantization:
    assert source.facts.prequantized is not None
    packed = source.facts.prequantized
    return Quantization(WeightFormat(packed.weight_format), packed.block_size)


def opened(folder: Path, **options: object) -> QuantizedLoRATrainer:
    from qlora_hal_backends.gptq_int4.trainer import open_trainer

    source, trainer = source_of(folder), open_trainer()
    trainer.load(source, storage_of(source), Compute("float32", options=options))
    return trainer


def adapter_for(trainer: QuantizedLoRATrainer) -> Adapter:
    modules = trainer.linear_modules()
    config = AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(modules)))
    start, generator = initial_adapter(config, modules, 1), np.random.default_rng(1)
    moved = {
        n: t if t.any() else generator.normal(0, 0.05, t.shape).astype(np.float32) for n, t in start.tensors.items()
    }
    return Adapter(moved, config)
