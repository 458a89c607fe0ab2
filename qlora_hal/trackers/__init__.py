"""Trackers as observers of a run: each is a small object around its library, used only when that is installed.

metrics.jsonl is always written and needs none of them. The figures are the same in every tracker: `train/loss`,
`train/grad_norm`, `train/learning_rate`, `train/epoch`, `train/tokens_per_second`, `train/memory_bytes`, `eval/loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from qlora_hal.errors import ConfigError
from qlora_hal.errors.installation import pip
from qlora_hal.trackers.observer import Tracker, TrackerObserver


class _TrackerModule(Protocol):
    def make_tracker(self) -> Tracker: ...


def observers_for(report_to: Sequence[str]) -> tuple[object, ...]:
    """One observer for each name in `training.report_to`, which is that of its package too. Raises ConfigError (U05)
    naming all absent ones."""
    named = tuple(dict.fromkeys(report_to))
    absent = [name for name in named if find_spec(name) is None]
    if absent:
        raise ConfigError(
            "QH-U05",
            f"training.report_to names {', '.join(absent)}, not installed here.",
            where="training.report_to",
            fix=f"Run: {pip('install ' + ' '.join(absent))}",
        )
    modules = [import_module(f"{__name__}.{name}") for name in named]
    return tuple(TrackerObserver(cast(_TrackerModule, module).make_tracker()) for module in modules)
