"""The small configuration of the end-to-end tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_hal import TrainResult, train
from qlora_hal.demo import data_path, model_path


def first_rows(count: int) -> Path:
    """The first rows of the demo, in a file that lasts as long as this process: preparing all 5,169 takes longer than
    most of these runs train."""
    folder = Path(tempfile.mkdtemp(prefix="qlora-hal-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)[:count]))
    return rows


SMALL: dict[str, Any] = {
    "model": {"name_or_path": str(model_path())},
    "data": {"path": str(first_rows(640)), "max_seq_length": 128, "truncation": "drop"},
    "lora": {"r": 8, "alpha": 16},
    "training": {
        "learning_rate": 2e-3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seed": 7,
    },
    "backend": {"name": "cpu_torch"},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` in dotted keys laid over a tree."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        target = tree.setdefault(group, {}) if group else tree
        target[name] = value
    return tree


def small_run(folder: Path, changes: dict[str, Any]) -> TrainResult:
    return train(merged(SMALL, {**changes, "output_dir": str(folder)}))
