"""The small configuration of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_hal import TrainResult, train
from qlora_hal.demo import data_path, model_path

SMALL: dict[str, Any] = {
    "model": {"name_or_path": str(model_path())},
    "data": {"path": str(data_path("train")), "max_seq_length": 128, "truncation": "drop"},
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
