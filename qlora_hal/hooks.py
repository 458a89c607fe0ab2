"""The pluggy hooks: who calls them, when, and what a return value means. Entry-point group: `qlora_hal.hooks`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pluggy

from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, ProbeReport
    from qlora_hal.contract.capabilities import Requirements
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.inference.loaded_model import LoadedModel
    from qlora_hal.run.result import RunView, TrainResult

T = TypeVar("T")
PROJECT = "qlora_hal"
ENTRY_POINT_GROUP = "qlora_hal.hooks"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class Control:
    """What an observer asks of the run.

    An answer to step n takes hold once step n + 1 is taken, which was under way already: the run stops, saves or
    evaluates then, and step n + 2 is the first with another learning rate. An answer to an evaluation takes hold at
    once. What was asked is saved with the run, so one that was killed does the same when it goes on; an observer's own
    memory is not.

    `stop` ends the run as early stopping does: its adapter is written, and no resume takes a further step.
    `learning_rate_factor` multiplies the scheduled rate from then on, on top of earlier factors. Of several observers
    all are heeded. Raises ValueError for a factor that is not a finite number above 0; numbers of NumPy and of tensor
    libraries become Python's, for what is asked is saved as JSON.
    """

    stop: bool = False
    save: bool = False
    evaluate: bool = False
    learning_rate_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "save", "evaluate"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.learning_rate_factor is None:
            return
        factor = float(self.learning_rate_factor)
        if not _can_be_factor(factor):
            raise ValueError(f"learning_rate_factor is {factor}; a finite number above 0 is expected")
        object.__setattr__(self, "learning_rate_factor", factor)


def _can_be_factor(factor: float) -> bool:
    return math.isfinite(factor) and factor > 0


MOST_FIGURES, LONGEST_NAME = 500, 100
"""Of an evaluation: its line in metrics.jsonl is read back within bounds."""
OWN_FIGURES = frozenset({"loss", "tokens"})
"""An evaluation's line in metrics.jsonl has its own `eval_loss` and `eval_tokens`."""

STEERING_HOOKS = ("qlora_hal_metrics", "qlora_hal_control")


@hookspec
def qlora_hal_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Offer backends from inside this process, beside the entry points. Called at each discovery."""


@hookspec(firstresult=True)
def qlora_hal_choose_backend(reports: tuple[ProbeReport, ...], needs: Requirements) -> str | None:
    """Override the automatic choice: return the name of a ready backend, or None to leave it. Called once a run."""


@hookspec(firstresult=True)
def qlora_hal_config_ready(config: RunConfig) -> RunConfig | None:
    """Replace the configuration before anything is resolved from it, or None to leave it. Called once a run."""


@hookspec
def qlora_hal_run_started(run: RunView) -> None:
    """Observe: the model is loaded, the first step is about to run. Called once a run."""


@hookspec
def qlora_hal_step_finished(
    run: RunView,
    step: int,
    stats: StepStats,
    learning_rate: float,
    epoch: float,
    tokens_per_second: float,
    memory_bytes: int | None,
) -> None:
    """Observe: one optimizer step is known. Called once a step, one step late. `epoch` counts from 0 with fractions,
    `tokens_per_second` is of this step, `memory_bytes` the device's peak so far where the backend tells it."""


@hookspec
def qlora_hal_evaluated(run: RunView, step: int, evaluation: LossSum, metrics: Mapping[str, float]) -> None:
    """Observe: an evaluation ended. Called before, during (`training.eval_steps`) and after training. `metrics` are
    what `qlora_hal_metrics` gave."""


@hookspec
def qlora_hal_metrics(run: RunView, step: int, model: LoadedModel) -> Mapping[str, float]:  # type: ignore[empty-body]
    """Measure: figures of the model as it is now, by name. Called with each evaluation, before observers are."""


@hookspec
def qlora_hal_control(
    run: RunView, step: int, stats: StepStats | None, evaluation: LossSum | None, metrics: Mapping[str, float]
) -> Control | None:
    """Steer: what the run is to do otherwise, or None. Called after `qlora_hal_step_finished` with `stats`, and after
    each evaluation on the way with `evaluation` and `metrics`. See `Control` for when it takes hold."""


@hookspec
def qlora_hal_checkpoint_saved(run: RunView, step: int, path: Path) -> None:
    """Observe: a checkpoint is durable under its final name."""


@hookspec
def qlora_hal_run_finished(run: RunView, result: TrainResult) -> None:
    """Observe: everything is written. Called once a run."""


@hookspec
def qlora_hal_run_failed(run: RunView, error: BaseException) -> None:
    """Observe: an exception ended the run after `qlora_hal_run_started`, so `qlora_hal_run_finished` is not to come.
    Record and report are written where they could be. `error` is what `train` raises."""


@hookspec
def qlora_hal_conformance_sections() -> Iterable[Path]:  # type: ignore[empty-body]
    """Offer extra conformance sections of a plugin; they never count towards a certificate."""


class Hooks:
    """The plugins of one run: entry points of `qlora_hal.hooks`, and observers given in Python.

    An observer that raises is reported once through `note` and heard no more; it never stops training. One that would
    never be called is refused at the start: raises ConfigError QH-U20.
    """

    def __init__(
        self,
        observers: Iterable[object] = (),
        *,
        note: Callable[[str], None] = lambda text: None,
        tells: bool = True,
    ) -> None:
        """`tells` False asks plugins what they decide, and tells them nothing: for a rank behind the first."""
        self._note = note
        self._tells = tells
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(sys.modules[__name__])
        for point in entry_points(group=ENTRY_POINT_GROUP):
            self._add(point.name, point.load)
        for number, observer in enumerate(observers, start=1):
            name = getattr(observer, "name_in_notes", f"observer {number} ({type(observer).__name__})")
            self._observe(name, observer)

    def offered_backends(self) -> tuple[BackendSpec, ...]:
        return tuple(spec for offered in self._manager.hook.qlora_hal_backends() for spec in offered)

    @property
    def chooses_backend(self) -> bool:
        """Whether a plugin may choose the backend, which takes the facts of the model."""
        return bool(self._manager.hook.qlora_hal_choose_backend.get_hookimpls())

    def chosen_backend(self, reports: tuple[ProbeReport, ...], needs: Requirements) -> str | None:
        name: str | None = self._manager.hook.qlora_hal_choose_backend(reports=reports, needs=needs)
        return name

    def ready_config(self, config: RunConfig) -> RunConfig:
        replaced: RunConfig | None = self._manager.hook.qlora_hal_config_ready(config=config)
        return replaced if replaced is not None else config

    def tell(self, hook: str, **facts: object) -> None:
        """Call one observing hook of every plugin, each behind its own wall."""
        if self._tells:
            self._answers(hook, object, facts)

    def control(self, **facts: object) -> Control | None:
        """What the plugins ask of the run together, or None."""
        asked = self._answers("qlora_hal_control", Control, facts)
        if not asked:
            return None
        factors = [control.learning_rate_factor for control in asked if control.learning_rate_factor is not None]
        factor = math.prod(factors) if factors else None
        if factor is not None and not _can_be_factor(factor):
            self._note(f"observers asked for rates that are {factor:g} times as high together; none changes")
            factor = None
        return Control(
            stop=any(control.stop for control in asked),
            save=any(control.save for control in asked),
            evaluate=any(control.evaluate for control in asked),
            learning_rate_factor=factor,
        )

    def measured(self, **facts: object) -> dict[str, float]:
        """The figures that the plugins give of a model, by name; what is no number, or has the name of a figure of the
        run itself, is told of and left out."""
        figures: dict[str, float] = {}
        for found in self._answers("qlora_hal_metrics", dict, facts):
            for name, value in found.items():
                if why := _unfit_figure(str(name), value, figures):
                    self._note(f"metric {name} is left out: {why}")
                else:
                    figures[str(name)] = float(value)
        return figures

    def steering(self) -> list[str]:
        """The names of the plugins that steer a run, or measure its model."""
        found = [impl for hook in STEERING_HOOKS for impl in getattr(self._manager.hook, hook).get_hookimpls()]
        return list(dict.fromkeys(impl.plugin_name for impl in found))

    def _answers(self, hook: str, kind: type[T], facts: Mapping[str, object]) -> list[T]:
        """What each plugin answers that answers anything; one that raises, or answers in another kind, is told of once
        and asked no more."""
        answers: list[T] = []
        plugins = [impl.plugin for impl in getattr(self._manager.hook, hook).get_hookimpls()]
        everyone = self._manager.get_plugins()
        for plugin in plugins:
            call = self._manager.subset_hook_caller(hook, [other for other in everyone if other is not plugin])
            try:
                for found in call(**facts):
                    if not isinstance(found, kind):
                        raise TypeError(f"it gave a value of type {type(found).__name__}, not {kind.__name__}")
                    answers.append(found)
            except Exception as error:
                name = self._manager.get_name(plugin)
                self._manager.unregister(plugin)
                self._note(f"{name} failed in {hook} and is disabled: {type(error).__name__}: {error}")
        return answers

    def _observe(self, name: str, observer: object) -> None:
        """Register what the caller gave. Raises ConfigError QH-U20 when it has no hook, or one that nobody calls."""
        try:
            self._manager.register(observer, name=name)
        except Exception as error:
            raise _unfit(name, f"cannot be called: {str(error).splitlines()[-1]}") from error
        calls = self._manager.get_hookcallers(observer) or []
        if not calls and "TrainerCallback" in {kind.__name__ for kind in type(observer).__mro__}:
            raise _unfit(name, "is a TrainerCallback; qlora_hal.trainer_callbacks.as_observer(callback) makes it one")
        if not calls:
            raise _unfit(name, "has no hook; mark its methods with qlora_hal.hooks.hookimpl")
        if unknown := [call.name for call in calls if not call.has_spec()]:
            nearest = get_close_matches(unknown[0], _hook_names(), n=1)
            raise _unfit(name, f"has {unknown[0]}, and no hook has that name" + "".join(f"; {n} has" for n in nearest))

    def _add(self, name: str, load: Callable[[], object]) -> None:
        """Register one plugin, or say why not: the stock loader lets one broken plugin stop all others."""
        try:
            plugin = load()
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except (Exception, SystemExit) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._note(f"plugin {name} is skipped: {type(error).__name__}: {error}")


def _unfit_figure(name: str, value: object, others: Mapping[str, float]) -> str:
    """Why a figure of a model cannot be kept under its name; empty where it can."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"it is a {type(value).__name__}, not a number"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "it is larger than any number with a point"
    if len(name) > LONGEST_NAME or len(others) >= MOST_FIGURES:
        return f"at most {MOST_FIGURES} are kept, with names of up to {LONGEST_NAME} characters"
    if name in OWN_FIGURES:
        return f"eval_{name} is a figure of the run itself"
    return "another observer gives one of that name" if name in others else ""


def _hook_names() -> list[str]:
    return [name for name in globals() if name.startswith(f"{PROJECT}_")]


def _unfit(name: str, problem: str) -> ConfigError:
    return ConfigError(
        "QH-U20",
        f"{name[0].upper()}{name[1:]} {problem}.",
        where="observers",
        fix=f"Mark with hookimpl one of {', '.join(_hook_names())}.",
    )
