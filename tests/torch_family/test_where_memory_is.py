"""What is recomputed, where a base lives and where activations wait: the same losses and gradients everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Float32, StepSettings
from qlora_hal_backends.cpu_torch import SPEC
from qlora_hal_backends.torch_family.platform import CPU
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

NF4 = Quantization(WeightFormat.NF4, 64, True)
EVERYWHERE = ("embeddings", "layers", "head")


def trainer_of(path: Path, compute: Compute, quantization: Quantization = NF4) -> TorchLoRATrainer:
    trainer = TorchLoRATrainer(SPEC, CPU)
    trainer.load(source_of(path), quantization, compute)
    shapes = trainer.linear_modules()
    trainer.attach(moved_adapter(AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(shapes))), shapes))
    return trainer


def losses_and_adapter(trainer: TorchLoRATrainer) -> tuple[list[float], Mapping[str, Float32]]:
    """Three steps of two micro-batches, an evaluation between them."""
    losses = []
    for number in range(3):
        window = [random_batch(2 * number), random_batch(2 * number + 1)]
        denominator = float(sum(batch.counted_tokens for batch in window))
        losses.append(trainer.train_step(window, StepSettings(1e-2, denominator, max_grad_norm=1.0)).resolve().loss)
        losses.append(trainer.evaluate(window).loss)
    return losses, trainer.export_adapter().tensors


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_recomputation_changes_no_bit_on_a_cpu(recompute: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama")
    kept = losses_and_adapter(trainer_of(path, Compute("float32")))
    found = losses_and_adapter(trainer_of(path, Compute("float32", True, recompute=recompute)))  # type: ignore[arg-type]
    assert found[0] == kept[0]
    for name, tensor in kept[1].items():
        np.testing.assert_array_equal(found[1][name], tensor)


@pytest.mark.parametrize("weight_format", [WeightFormat.NF4, WeightFormat.INT8, WeightFormat.NONE])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_base_gives_the_bits_of_a_resident_one(
    weight_format: WeightFormat, checkpointing: bool, tmp_path: Path
) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    four_bit = weight_format is WeightFormat.NF4
    quantization = Quantization(weight_format, 64 if four_bit else None, four_bit)
    resident = losses_and_adapter(trainer_of(path, Compute("float32", checkpointing), quantization))
    streamed = losses_and_adapter(
        trainer_of(path, Compute("float32", checkpointing, base_offload=("embeddings", "layers")), quantization)
    )
    assert streamed[0] == resident[0]
    for name, tensor in resident[1].items():
        np.testing.assert_array_equal(streamed[1][name], tensor)
