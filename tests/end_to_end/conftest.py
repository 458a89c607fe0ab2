"""The embedded demo, trained for real on the CPU. One run serves every test that only looks at its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, train
from qlora_hal.demo import data_path


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., TrainResult]:
    """Train the small configuration with changes in dotted keys."""

    def run(name: str = "run", **changes: Any) -> TrainResult:
        settings = {key.replace("__", "."): value for key, value in changes.items()}
        return train(merged(SMALL, {"output_dir": str(tmp_path / name), **settings}))

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """With validation, samples and checkpoints."""
    rows = tmp_path_factory.mktemp("rows") / "validation.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:40]))
    changes = {
        "output_dir": str(tmp_path_factory.mktemp("demo") / "run"),
        "data.validation_path": str(rows),
        "training.max_steps": 12,
        "training.eval_steps": 4,
        "training.sample_prompts": ["What does the command tail do?"],
        "checkpoint.save_steps": 5,
    }
    return train(merged(SMALL, changes))
