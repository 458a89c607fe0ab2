"""Trackers as observers of a run: each is a small object with our hooks, used only when its library is installed.

metrics.jsonl is always written and needs none of them. The figures are the same in every tracker:
`train/loss`, `train/grad_norm`, `train/learning_rate`, `eval/loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from qlora_hal.errors import ConfigError
from qlora_hal.errors.installation import pip


class _ObserverModule(Protocol):
    def make_observer(self) -> object: ...


def observers_for(report_to: Sequence[str]) -> tuple[object, ...]:
    """One observer for each name in `training.report_to`, which is that of its package too. Raises ConfigError (U05)
    naming all absent ones."""
    absent = [name for name in report_to if find_spec(name) is None]
    if absent:
        raise ConfigError(
            "QH-U05",
            f"training.report_to names {', '.join(absent)}, not installed here.",
            where="training.report_to",
            fix=f"Run: {pip('install ' + ' '.join(absent))}",
        )
    modules = [import_module(f"{__name__}.{name}") for name in report_to]
    return tuple(cast(_ObserverModule, module).make_observer() for module in modules)
