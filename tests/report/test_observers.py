"""Trackers: named ones must be installed; the figures are the same everywhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.values import LossSum, StepStats
from qlora_hal.errors import ConfigError
from qlora_hal.errors.installation import pip
from qlora_hal.hooks import Hooks
from qlora_hal.run.result import RunView, TrainResult
from qlora_hal.trackers import figures_of_run, observers_for

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def test_no_tracker_is_used_unless_named() -> None:
    assert observers_for(()) == ()


@pytest.mark.fault("U05")
def test_trackers_that_are_absent_are_all_named_with_one_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_hal.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names tensorboard, wandb, not installed here") as caught:
        observers_for(("tensorboard", "wandb"))
    assert (caught.value.code, caught.value.exit_status) == ("QH-U05", 2)
    assert caught.value.fix == f"Run: {pip('install tensorboard wandb')}"


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_is_either_made_or_refused(name: str) -> None:
    if find_spec(name) is None:
        with pytest.raises(ConfigError, match=name):
            observers_for((name,))
    else:
        assert len(observers_for((name,))) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_the_hooks_of_every_tracker_fit_their_specification(name: str) -> None:
    from importlib import import_module

    notes: list[str] = []
    observer = import_module(f"qlora_hal.trackers.{name}").make_observer()
    hooks = Hooks((observer,), note=notes.append)
    # Before a run has started there is nothing to write to, and nothing fails.
    run = RunView(Path("runs/a"), RunConfig(), {}, 1)
    hooks.tell("qlora_hal_step_finished", run=run, step=1, stats=StepStats(1.0, 1, 1.0), learning_rate=1e-4)
    hooks.tell("qlora_hal_evaluated", run=run, step=1, evaluation=LossSum(1.0, 1))
    hooks.tell("qlora_hal_run_failed", run=run, error=MemoryError())
    assert notes == []


class Library:
    """A tracker's library, or its run: every name is a call that returns it and is remembered. None is installed here.

    The arguments of calls whose name is in `shown` are remembered as well.
    """

    def __init__(self, shown: tuple[str, ...]) -> None:
        self.calls: list[str] = []
        self._shown = shown

    def __getattr__(self, name: str) -> Callable[..., Library]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*values: object, **named: object) -> Library:
            given = [*map(repr, values), *(f"{key}={value!r}" for key, value in named.items())]
            self.calls.append(f"{name}({', '.join(given) if name in self._shown else ''})")
            return self

        return call


@pytest.mark.parametrize(
    ("name", "modules", "failed", "finished"),
    [
        ("tensorboard", ("tensorboard", "tensorboard.summary"), ["close()"], ["close()"]),
        ("wandb", ("wandb",), ["finish(exit_code=1)"], ["finish(exit_code=0)"]),
        ("mlflow", ("mlflow",), ["end_run('FAILED')"], ["end_run('FINISHED')"]),
        ("trackio", ("trackio",), ["finish()"], ["finish()"]),
    ],
)
def test_a_tracker_is_ended_once_as_the_run_did(
    monkeypatch: pytest.MonkeyPatch, name: str, modules: tuple[str, ...], failed: list[str], finished: list[str]
) -> None:
    from importlib import import_module

    ends, notes = ("close", "finish", "end_run"), list[str]()
    run = RunView(Path("runs/a"), RunConfig(), {}, 1)
    result = TrainResult("b", "cpu", "nf4", 64, run.run_dir, run.run_dir, 1, 1, (), None, None, 1.0, None, "finished")
    for hook, facts, expected in (
        ("qlora_hal_run_failed", {"error": MemoryError()}, failed),
        ("qlora_hal_run_finished", {"result": result}, finished),
    ):
        library = Library(ends)
        vars(library)["summary"] = library  # an attribute of wandb's run
        for module in modules:
            monkeypatch.setitem(sys.modules, module, library)
        hooks = Hooks((import_module(f"qlora_hal.trackers.{name}").make_observer(),), note=notes.append)
        hooks.tell("qlora_hal_run_started", run=run)
        for _ in range(2):
            hooks.tell(hook, run=run, **facts)
        assert [call for call in library.calls if call.startswith(ends)] == expected
    assert notes == []


def test_figures_that_are_not_finite_are_left_out() -> None:
    assert figures_of_run.of_step(StepStats(math.nan, 1, 2.0), 1e-4) == {
        "train/grad_norm": 2.0,
        "train/learning_rate": 1e-4,
    }
    assert figures_of_run.of_evaluation(LossSum(0.0, 0)) == {}


@pytest.mark.fault("X11")
def test_settings_go_to_a_tracker_without_secrets_and_without_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-hub-1234567")
    config = RunConfig.model_validate(
        {"model": {"name_or_path": str(Path.home() / "m")}, "data": {"path": "x/canary-hub-1234567"}}
    )
    sent = figures_of_run.settings_of(RunView(Path("runs/a"), config, {"block_size": None}, 1))
    assert sent["model.name_or_path"] == "~/m"
    assert sent["data.path"] == "x/[removed]"
    assert sent["resolved.block_size"] == "None"
