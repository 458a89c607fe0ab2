"""The pluggy hooks: who calls them, when, and what a return value means. Entry-point group: `qlora_hal.hooks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, ProbeReport
    from qlora_hal.contract.capabilities import Requirements
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult

PROJECT = "qlora_hal"
ENTRY_POINT_GROUP = "qlora_hal.hooks"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


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
def qlora_hal_evaluated(run: RunView, step: int, evaluation: LossSum) -> None:
    """Observe: an evaluation ended. Called before, during (`training.eval_steps`) and after training."""


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
            self._observe(f"observer {number} ({type(observer).__name__})", observer)

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
        if not self._tells:
            return
        plugins = self._manager.get_plugins()
        for plugin in plugins:
            call = self._manager.subset_hook_caller(hook, [other for other in plugins if other is not plugin])
            try:
                call(**facts)
            except Exception as error:
                name = self._manager.get_name(plugin)
                self._manager.unregister(plugin)
                self._note(f"{name} failed in {hook} and is disabled: {type(error).__name__}: {error}")

    def _observe(self, name: str, observer: object) -> None:
        """Register what the caller gave. Raises ConfigError QH-U20 when it has no hook, or one that nobody calls."""
        try:
            self._manager.register(observer, name=name)
        except Exception as error:
            raise _unfit(name, f"cannot be called: {str(error).splitlines()[-1]}") from error
        calls = self._manager.get_hookcallers(observer) or []
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


def _hook_names() -> list[str]:
    return [name for name in globals() if name.startswith(f"{PROJECT}_")]


def _unfit(name: str, problem: str) -> ConfigError:
    return ConfigError(
        "QH-U20",
        f"{name[0].upper()}{name[1:]} {problem}.",
        where="observers",
        fix=f"Mark with hookimpl one of {', '.join(_hook_names())}.",
    )
