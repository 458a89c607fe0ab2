"""Real tiny models on MLX's default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tiny_models import write_model
from trainers import OpenTrainer, moved_adapter, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def open_mlx_trainer(
    folder: Path,
    *,
    weight_format: str = "none",
    block_size: int | None = None,
    double_quant: bool = False,
    dtype: str = "float32",
    checkpointing: bool = False,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    compile: str = "off",
) -> OpenTrainer:
    from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

    trainer = MLXLoRATrainer()
    quantization = Quantization(WeightFormat(weight_format), block_size, double_quant)
    trainer.load(source_of(folder), quantization, Compute(dtype, checkpointing, {"compile": compile}))  # type: ignore[arg-type]
    modules = trainer.linear_modules()
    adapter = moved_adapter(AdapterConfig(4, 8.0, dropout, False, tuple(sorted(targets or modules))), modules)
    trainer.attach(adapter)
    return OpenTrainer(trainer, adapter)


@pytest.fixture
def opened() -> Iterator[Callable[..., OpenTrainer]]:
    """Open trainers that are closed after the test."""
    trainers: list[OpenTrainer] = []

    def open_one(folder: Path, **choices: object) -> OpenTrainer:
        trainers.append(open_mlx_trainer(folder, **choices))  # type: ignore[arg-type]
        return trainers[-1]

    yield open_one
    for trainer in trainers:
        trainer.trainer.close()
