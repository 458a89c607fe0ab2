"""Figures that a user's own functions give of the model at each evaluation, and which observers a run can have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.hooks import OWN_FIGURES, Hooks, hookimpl

if TYPE_CHECKING:
    from qlora_hal.contract.world import World
    from qlora_hal.inference.loaded_model import LoadedModel

    Metric: TypeAlias = Callable[[LoadedModel], float]


class MetricFunction:
    """The observer of one entry of `train(metrics={"exact_match": function})`: one that raises takes none along."""

    def __init__(self, name: str, function: Metric) -> None:
        """Raises ConfigError QH-U41 for what is no function under a name of its own."""
        if not callable(function) or not str(name).isidentifier() or name in OWN_FIGURES:
            raise ConfigError(
                "QH-U41",
                f"metrics has {name!r}: {type(function).__name__}; a name of letters, digits and underscores "
                f"(other than {' and '.join(sorted(OWN_FIGURES))}) with a function of the model was expected.",
                where="metrics",
                fix='Give it as metrics={"exact_match": function}, where function(model) returns a number.',
            )
        self._name, self._function = name, function
        self.name_in_notes = f"metric {name}"

    @hookimpl
    def qlora_hal_metrics(self, model: LoadedModel) -> Mapping[str, float]:
        return {self._name: number(self._function(model), self._name)}


def number(value: object, name: str) -> float:
    """Raises TypeError for what is none."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} gave a value of type {type(value).__name__}; a number is expected")
    found = float(value)
    return found if math.isfinite(found) else math.nan


def observers_with(metrics: Mapping[str, Metric] | None, observers: Sequence[object]) -> tuple[object, ...]:
    """The observers of a call, one for each of its metrics among them. Raises ConfigError QH-U20 and QH-U41 for what is
    no list of the ones, and no mapping of names to the others."""
    if isinstance(observers, str) or not isinstance(observers, Iterable):
        raise ConfigError(
            "QH-U20",
            f"observers is a value of type {type(observers).__name__}; a list of observers was expected.",
            where="observers",
            fix="Put it into a list: observers=[observer].",
        )
    if not isinstance(metrics, Mapping | None):
        raise ConfigError(
            "QH-U41",
            f"metrics is a value of type {type(metrics).__name__}; a mapping of names to functions was expected.",
            where="metrics",
            fix='Give it as metrics={"exact_match": function}, where function(model) returns a number.',
        )
    return (*observers, *(MetricFunction(name, function) for name, function in (metrics or {}).items()))


def check_observers(observers: Sequence[object], world: World, *, evaluates: bool) -> None:
    """Before anything is read: raises ConfigError QH-U41 for metrics that would never be asked for, and
    UnsupportedFeatureError QH-R06 for observers that steer or measure one of several ranks."""
    has_metrics = any(isinstance(observer, MetricFunction) for observer in observers)
    if has_metrics and not evaluates:
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
