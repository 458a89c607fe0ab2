"""The kept checkpoints, opened with this backend, and how near two engines must come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch, Float32, StepSettings
from qlora_hal.model.source import resolve_model

DATA = Path(__file__).parent / "data"
KINDS = ("in_order", "act_order")
VOCABULARY = 128

FLOAT32_ROUNDOFF = 2.0**-24
SUMMED = 2 * (4 * 64 + 2 * 64 + 128) + 64
"""Products that a logit passes through: in each layer q, k, v, o, gate and up over 64 inputs, down over 128, and some
attention; then the head."""


def opened(folder: Path) -> QuantizedLoRATrainer:
    """The checkpoint under whichever engine this environment has."""
    from qlora_hal_backends.gptq_int4.trainer import open_trainer

    source = resolve_model(str(folder), revision=None, trust_remote_code=False)
    assert source.facts.prequantized is not None
    trainer = open_trainer()
    trainer.load(source, Quantization(WeightFormat.INT4_GPTQ, source.facts.prequantized.block_size), Compute("float32"))
    return trainer


def largest_gap_to_the_library(folder: Path, trainer: QuantizedLoRATrainer) -> tuple[float, float]:
    """(gap, bound) between this backend's logits and those that the library computed from the same files.

    Both decode to the same float32 weights and sum in another order: 8 u sqrt(k) of the largest logit, k the length of
    the sums on the way (Higham 2002, chapter 4: sums of random signs grow with the root).
    """
    expected = load_file(folder.with_suffix(".expected.safetensors"))
    found = trainer.logits(batch_of(expected["input_ids"].astype(np.int32)))
    gap = float(np.abs(found - expected["logits"]).max())
    return gap, 8 * FLOAT32_ROUNDOFF * SUMMED**0.5 * float(np.abs(expected["logits"]).max())


def losses_of_training(trainer: QuantizedLoRATrainer, steps: int = 8) -> list[float]:
    """Train on one batch again and again; the mean loss before each step."""
    modules = trainer.linear_modules()
    config = AdapterConfig(8, 16.0, 0.0, False, tuple(sorted(modules)))
    trainer.attach(initial_adapter(config, modules, 3))
    random = np.random.default_rng(4)
    batch = batch_of(random.integers(3, VOCABULARY, (4, 24)).astype(np.int32))
    losses = []
    for _ in range(steps):
        stats = trainer.train_step([batch], StepSettings(1e-2, batch.counted_tokens)).resolve()
        losses.append(stats.loss_sum / stats.token_count)
    return losses


def batch_of(input_ids: np.ndarray) -> Batch:  # type: ignore[type-arg]
    """Whole rows, every token but the first with loss."""
    positions = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int32), input_ids.shape).copy()
    return Batch(input_ids, input_ids.copy(), positions, np.ones_like(input_ids))


def weights_of(trainer: QuantizedLoRATrainer) -> dict[str, Float32]:
    return {name: trainer.dequantized_weight(name) for name in trainer.linear_modules()}
