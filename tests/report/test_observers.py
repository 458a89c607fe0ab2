"""Trackers: named ones must be installed; the figures are the same everywhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
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
from qlora_hal.trackers.observer import TrackerObserver

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
REST_OF_STEP = {"learning_rate": 1e-4, "epoch": 0.5, "tokens_per_second": 300.0, "memory_bytes": None}


def observer_of(name: str) -> TrackerObserver:
    return TrackerObserver(import_module(f"qlora_hal.trackers.{name}").make_tracker())


def test_no_tracker_is_used_unless_named() -> None:
    assert observers_for(()) == ()


@pytest.mark.fault("U05")
def test_trackers_that_are_absent_are_all_named_with_one_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_hal.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names tensorboard, wandb, not installed here") as caught:
        observers_for(("tensorboard", "wandb", "wandb"))
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
def test_before_a_run_has_started_no_tracker_is_asked_anything(name: str) -> None:
    notes: list[str] = []
    hooks = Hooks((observer_of(name),), note=notes.append)
    run = RunView(Path("runs/a"), RunConfig(), {}, 1)
    hooks.tell("qlora_hal_step_finished", run=run, step=1, stats=StepStats(1.0, 1, 1.0), **REST_OF_STEP)
    hooks.tell("qlora_hal_evaluated", run=run, step=1, evaluation=LossSum(1.0, 1), metrics={})
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
        hooks = Hooks((observer_of(name),), note=notes.append)
        hooks.tell("qlora_hal_run_started", run=run)
        for _ in range(2):
            hooks.tell(hook, run=run, **facts)
        assert [call for call in library.calls if call.startswith(ends)] == expected
    assert notes == []


class Notebook:
    """A tracker that remembers all that it is asked to write."""

    def __init__(self) -> None:
        self.written: list[tuple[object, ...]] = []

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        self.written.append(("start", name, project, settings["training.learning_rate"]))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.written.append((step, dict(figures)))

    def finish(self, figures: Mapping[str, float], samples: Sequence[Mapping[str, str]]) -> None:
        self.written.append(("finish", figures["run/tokens_per_second"], list(samples)))

    def fail(self) -> None:
        self.written.append(("fail",))


def test_a_tracker_gets_settings_figures_and_sample_answers_in_order() -> None:
    training = {"learning_rate": 0.5, "report_to": ["wandb"], "tracker_project": "answers"}
    run = RunView(Path("runs/a"), RunConfig.model_validate({"training": training}), {}, 1)
    samples = ({"prompt": "Why?", "before": "x", "after": "Because."},)
    result = TrainResult(
        "b", "cpu", "nf4", 64, run.run_dir, run.run_dir, 1, 1, (), None, None, 1.0, None, "finished", 12.5, (), samples
    )
    notebook = Notebook()
    hooks = Hooks((TrackerObserver(notebook),), note=pytest.fail)
    hooks.tell("qlora_hal_run_started", run=run)
    step = {**REST_OF_STEP, "memory_bytes": 2048}
    hooks.tell("qlora_hal_step_finished", run=run, step=7, stats=StepStats(6.0, 3, 4.0), **step)
    hooks.tell("qlora_hal_evaluated", run=run, step=7, evaluation=LossSum(3.0, 2), metrics={"exact": 0.25})
    hooks.tell("qlora_hal_run_finished", run=run, result=result)
    assert notebook.written == [
        ("start", "a", "answers", 0.5),
        (
            7,
            {
                "train/loss": 2.0,
                "train/grad_norm": 4.0,
                "train/learning_rate": 1e-4,
                "train/epoch": 0.5,
                "train/tokens_per_second": 300.0,
                "train/memory_bytes": 2048.0,
            },
        ),
        (7, {"eval/loss": 1.5, "eval/exact": 0.25}),
        ("finish", 12.5, list(samples)),
    ]


@pytest.mark.parametrize("report_to", [[], ["tensorboard"]])
def test_a_project_that_no_tracker_would_take_is_refused(report_to: list[str]) -> None:
    with pytest.raises(ValueError, match="tracker_project needs wandb, mlflow or trackio"):
        RunConfig.model_validate({"training": {"report_to": report_to, "tracker_project": "answers"}})


def test_figures_that_are_not_finite_are_left_out() -> None:
    assert figures_of_run.of_step(StepStats(math.nan, 1, 2.0), 1e-4, 0.5, math.inf, None) == {
        "train/grad_norm": 2.0,
        "train/learning_rate": 1e-4,
        "train/epoch": 0.5,
    }
    assert figures_of_run.of_evaluation(LossSum(0.0, 0), {"exact": 0.5, "odd": math.inf}) == {"eval/exact": 0.5}


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
