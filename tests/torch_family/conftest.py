"""Real tiny models on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import write_model
from trainers import OpenTrainer, open_cpu_trainer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def opened() -> Iterator[Callable[..., OpenTrainer]]:
    """Open trainers that are closed after the test."""
    trainers: list[OpenTrainer] = []

    def open_one(folder: Path, **choices: object) -> OpenTrainer:
        trainers.append(open_cpu_trainer(folder, **choices))  # type: ignore[arg-type]
        return trainers[-1]

    yield open_one
    for trainer in trainers:
        trainer.trainer.close()
