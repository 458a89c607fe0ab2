"""Figures that a user's own functions give of the model at each evaluation, and which observers a run can have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.hooks import Hooks, hookimpl

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.world import World
    from qlora_hal.inference.loaded_model import LoadedModel

    Metric: TypeAlias = Callable[[LoadedModel], float]

TAKEN_NAMES = frozenset({"loss", "tokens"})
"""An evaluation's line in metrics.jsonl has its own `eval_loss` and `eval_tokens`."""


class MetricFunctions:
    """The observer for `train(metrics={"exact_match": function})`."""

    def __init__(self, functions: Mapping[str, Metric]) -> None:
        """Raises ConfigError QH-U41 for what is no function under a name of its own."""
        for name, function in functions.items():
            if not callable(function) or not str(name).isidentifier() or name in TAKEN_NAMES:
                raise ConfigError(
                    "QH-U41",
                    f"metrics has {name!r}: {type(function).__name__}; a name of letters, digits and underscores "
                    f"(other than {' and '.join(sorted(TAKEN_NAMES))}) with a function of the model was expected.",
                    where="metrics",
                    fix='Give it as metrics={"exact_match": function}, where function(model) returns a number.',
                )
        self._functions = dict(functions)

    @hookimpl
    def qlora_hal_metrics(self, model: LoadedModel) -> Mapping[str, float]:
        return {name: number(function(model), name) for name, function in self._functions.items()}


def number(value: object, name: str) -> float:
    """Raises TypeError for what is none."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} gave a value of type {type(value).__name__}; a number is expected")
    found = float(value)
    return found if math.isfinite(found) else math.nan


def observers_with(metrics: Mapping[str, Metric] | None, observers: Sequence[object]) -> tuple[object, ...]:
    """The observers of a call, one for its metrics among them."""
    return (*observers, *([MetricFunctions(metrics)] if metrics else []))


def check_observers(observers: Sequence[object], config: RunConfig, world: World) -> None:
    """Before anything is read: raises ConfigError QH-U41 for metrics that would never be asked for, and
    UnsupportedFeatureError QH-R06 for observers that steer or measure one of several ranks."""
    has_metrics = any(isinstance(observer, MetricFunctions) for observer in observers)
    if has_metrics and not (config.data.validation_path or config.data.validation_fraction):
        raise ConfigError(
            "QH-U41",
            "metrics are given, and nothing is evaluated: there are no validation rows.",
            where="metrics",
            fix="Set validation_path or validation_fraction; eval_steps says how often the run is evaluated.",
        )
    if world.size > 1 and (steering := Hooks(observers).steering()):
        raise UnsupportedFeatureError(
            "QH-R06",
            f"{', '.join(steering)} would steer or measure one of {world.size} ranks; all have to do the same.",
            where="observers",
            fix="Leave it out, or train on one device.",
        )
