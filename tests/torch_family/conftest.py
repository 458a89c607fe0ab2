"""Real tiny models on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import write_model
from trainers import OpenTrainer, open_cpu_trainer

INTERPRETED_EACH_TIME = (
    "test_loss_and_gradients_equal_those_of_the_plain_layers[triton-one sample a row-qwen3]",
    "test_loss_and_gradients_equal_those_of_the_plain_layers[triton-packed-llama with biases]",
    "test_recomputing_in_tiles_and_shared_buffers_equals_keeping_everything[triton-llama with biases-full]",
)
"""Triton's interpreter takes 10 to 120 seconds for a model. Each kernel has tests of its own; of whole layers these run
in `make test`, and the others in `make test-long`."""


WHOLE_LAYERS = ("test_loss_and_gradients_equal", "test_recomputing_in_tiles", "test_dropout_is_that")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        interpreted = item.path.name == "test_fused_layers.py" and "[triton-" in item.name
        if interpreted and item.name.startswith(WHOLE_LAYERS) and item.name not in INTERPRETED_EACH_TIME:
            item.add_marker(pytest.mark.long)


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
