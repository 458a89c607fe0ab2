"""Trackers as observers of a run: each is a small object with our hooks, used only when its library is installed.

metrics.jsonl is always written and needs none of them. The figures are the same in every tracker:
`train/loss`, `train/grad_norm`, `train/learning_rate`, `eval/loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from qlora_hal.errors import ConfigError

# Tracker -> (module to look for, what to install). tensorboard's own writer is used: it needs no torch.
_TRACKERS: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
}


class _ObserverModule(Protocol):
    def make_observer(self) -> object: ...


def observers_for(report_to: Sequence[str]) -> tuple[object, ...]:
    """One observer for each name in `training.report_to`. Raises ConfigError (U05) naming all absent ones."""
    absent = [name for name in report_to if find_spec(_TRACKERS[name][0]) is None]
    if absent:
        packages = " ".join(_TRACKERS[name][1] for name in absent)
        raise ConfigError(
            "QH-U05",
            f"training.report_to names {', '.join(absent)}, not installed here.",
            where="training.report_to",
            fix=f"Run: pip install {packages}",
        )
    modules = [import_module(f"{__name__}.{name}") for name in report_to]
    return tuple(cast(_ObserverModule, module).make_observer() for module in modules)
