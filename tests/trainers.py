"""A CPU trainer with an adapter whose B is not zero, and batches to feed it. Tests only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
    AdapterConfig,
    Batch,
    Float32,
    LinearShape,
    StepSettings,
    StepStats,
)
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource

FIRST_ORDINARY_TOKEN = 3


@dataclass
class OpenTrainer:
    trainer: QuantizedLoRATrainer
    adapter: Adapter

    def step(self, window: Sequence[Batch], learning_rate: float = 1e-2, **settings: object) -> StepStats:
        count = sum(batch.counted_tokens for batch in window)
        first, placed = 0, []
        for batch in window:
            placed.append(replace(batch, rows=np.arange(first, first + len(batch.labels), dtype=np.int32)))
            first += len(batch.labels)
        return self.trainer.train_step(placed, StepSettings(learning_rate, count, **settings)).resolve()  # type: ignore[arg-type]


def source_of(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder, read_facts(folder))


def open_cpu_trainer(
    folder: Path,
    *,
    weight_format: str = "none",
    dtype: str = "float32",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    dropout: float = 0.0,
    r: int = 4,
    targets: Sequence[str] | None = None,
    use_rslora: bool = False,
) -> OpenTrainer:
    from qlora_hal_backends.cpu_torch.trainer import open_trainer

    four_bit = weight_format in ("nf4", "fp4")
    trainer = open_trainer()
    quantization = Quantization(WeightFormat(weight_format), 64 if four_bit else None, four_bit)
    trainer.load(source_of(folder), quantization, Compute(dtype, checkpointing))  # type: ignore[arg-type]
    modules = trainer.linear_modules()
    names = tuple(sorted(targets or modules))
    adapter = moved_adapter(AdapterConfig(r, 2.0 * r, dropout, use_rslora, names), modules)
    trainer.attach(adapter, optimizer)
    return OpenTrainer(trainer, adapter)


def moved_adapter(config: AdapterConfig, modules: Mapping[str, LinearShape], seed: int = 1) -> Adapter:
    """An adapter in mid-training: with B = 0 half of all mistakes are invisible."""
    start = initial_adapter(config, modules, seed)
    generator = np.random.default_rng(seed)
    tensors = {
        name: tensor if tensor.any() else generator.normal(0, 0.05, tensor.shape).astype(np.float32)
        for name, tensor in start.tensors.items()
    }
    return Adapter(tensors, config)


def random_batch(
    seed: int, rows: int = 2, time: int = 20, *, vocabulary: int = 320, padding: int = 0, prompt: int = 3
) -> Batch:
    """Rows of one sample; the first row ends in `padding` pads, each row's first `prompt` tokens carry no loss."""
    generator = np.random.default_rng(seed)
    input_ids = generator.integers(FIRST_ORDINARY_TOKEN, vocabulary, (rows, time)).astype(np.int32)
    segment_ids = np.ones_like(input_ids)
    if padding:
        segment_ids[0, -padding:] = 0
    labels = np.where(segment_ids > 0, input_ids, IGNORE_LABEL).astype(np.int32)
    labels[:, : max(prompt, 1)] = IGNORE_LABEL
    position_ids = (np.arange(time, dtype=np.int32) * (segment_ids > 0)).astype(np.int32)
    return Batch(input_ids, labels, position_ids, segment_ids)


def packed(batches: Sequence[Batch]) -> Batch:
    """Every row of every batch, without its padding, in one row."""
    pieces = [
        (batch, row, int((batch.segment_ids[row] > 0).sum())) for batch in batches for row in range(len(batch.labels))
    ]

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(batch, field)[row, :length] for batch, row, length in pieces])[None]

    segments = np.concatenate([np.full(length, n, np.int32) for n, (_, _, length) in enumerate(pieces, 1)])[None]
    return Batch(joined("input_ids"), joined("labels"), joined("position_ids"), segments)


def largest_difference(left: dict[str, Float32], right: dict[str, Float32]) -> float:
    """Relative to the largest entry of each tensor."""
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max() / max(np.abs(right[name]).max(), 1e-30)) for name in left)
