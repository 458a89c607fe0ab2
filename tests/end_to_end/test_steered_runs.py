"""Observers that steer real runs, metrics of the user's own, and callbacks of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged
from stopped_runs import SHORT, StopAfter, adapter_bytes, rows_in, whole_run
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

from qlora_hal import Control, LoadedModel, hookimpl, resume, train
from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.values import LossSum, StepStats
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError, StoppedError, UnsupportedFeatureError
from qlora_hal.hooks import Hooks
from qlora_hal.run.measured import MetricFunction, check_observers, observers_with
from qlora_hal.run.result import RunView
from qlora_hal.trainer_callbacks import as_observer

pytestmark = pytest.mark.usefixtures("usual_signals")

ASKED = "What does tail do?"


class Halves:
    """Halves the rate after each step that is even."""

    @hookimpl
    def qlora_hal_control(self, step: int, stats: object) -> Control | None:
        return Control(learning_rate_factor=0.5) if stats is not None and step % 2 == 0 else None


def logged(run: Path, name: str) -> list[object]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("given_again", [True, False])
def test_a_steered_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, given_again: bool) -> None:
    rows = rows_in(tmp_path)
    settings = {**SHORT, **rows, "training.max_steps": 6, "training.lr_scheduler_type": "constant"}
    whole = train(merged(SMALL, {**settings, "output_dir": str(tmp_path / "whole")}), observers=[Halves()])
    # Answers to steps 2 and 4 are known when it stops; that to step 6 would come too late to matter.
    with pytest.raises(StoppedError):
        train(merged(SMALL, {**settings, "output_dir": str(tmp_path / "run")}), observers=[Halves(), StopAfter(4)])
    went_on = resume(tmp_path / "run", observers=[Halves()] if given_again else [])
    assert logged(whole.run_dir, "learning_rate") == [2e-3, 2e-3, 2e-3, 1e-3, 1e-3, 5e-4]
    assert logged(went_on.run_dir, "learning_rate") == logged(whole.run_dir, "learning_rate")
    assert adapter_bytes(went_on.adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.slow
def test_metrics_are_asked_for_at_each_evaluation_and_change_nothing(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    plain = whole_run(tmp_path / "plain", rows)
    asked: list[LoadedModel] = []

    def answer_length(model: LoadedModel) -> float:
        asked.append(model)
        return len(model.generate(ASKED, max_new_tokens=3))

    changes = {**SHORT, **rows, "output_dir": str(tmp_path / "run")}
    measured = train(merged(SMALL, changes), metrics={"answer_length": answer_length})
    assert len(asked) == 3  # before, after step 2, after step 4
    lengths = [row["eval_answer_length"] for row in measured.metrics if "eval_answer_length" in row]
    assert len(lengths) == 3
    assert all(isinstance(length, float) for length in lengths)
    assert adapter_bytes(measured.adapter_dir) == adapter_bytes(plain.adapter_dir)
    assert plain.metrics.columns()["loss"] == measured.metrics.columns()["loss"]


@pytest.mark.fault("U41")
def test_metrics_without_anything_to_evaluate_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    settings = merged(SMALL, {"output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"QH-U41.*nothing is evaluated"):
        train(settings, metrics={"length": lambda model: 1.0})
    with pytest.raises(ConfigError, match=r"QH-U41.*metrics has 'loss'"):
        train(settings, metrics={"loss": lambda model: 1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("R06")
@pytest.mark.parametrize("observer", [Halves(), MetricFunction("length", len)])
def test_what_steers_or_measures_is_refused_on_several_ranks(observer: object) -> None:
    named = r"QH-R06.*(observer 1 \(Halves\)|metric length) would steer or measure one of 2 ranks"
    with pytest.raises(UnsupportedFeatureError, match=named):
        check_observers([observer], World(1, 2), evaluates=True)
    check_observers([observer], World(), evaluates=True)


def figures_of(*observers: object) -> tuple[list[dict[str, float]], list[str]]:
    """What two evaluations are given by observers, and the notes."""
    notes: list[str] = []
    hooks = Hooks(observers, note=notes.append)
    return [hooks.measured(run=None, step=step, model=None) for step in (1, 2)], notes


def test_a_metric_that_raises_takes_no_other_along() -> None:
    functions: dict[str, Any] = {"bad": lambda model: 1 / 0, "none": lambda model: None, "good": lambda model: 0.5}
    figures, notes = figures_of(*observers_with(functions, []))
    assert figures == [{"good": 0.5}] * 2
    assert notes == [
        "metric bad failed in qlora_hal_metrics and is disabled: ZeroDivisionError: division by zero",
        "metric none failed in qlora_hal_metrics and is disabled: "
        "TypeError: none gave a value of type NoneType; a number is expected",
    ]


class Gives:
    def __init__(self, **figures: object) -> None:
        self._figures = figures

    @hookimpl
    def qlora_hal_metrics(self) -> dict[str, object]:
        return self._figures


def test_no_observer_overwrites_the_loss_of_a_run_or_the_figure_of_another() -> None:
    figures, notes = figures_of(Gives(f1=0.5), Gives(loss=0.0, tokens=1, f1=0.25, sure=True, recall=1))
    assert figures == [{"f1": 0.5, "recall": 1}] * 2
    assert notes[:4] == [
        "metric loss is left out: eval_loss is a figure of the run itself",
        "metric tokens is left out: eval_tokens is a figure of the run itself",
        "metric f1 is left out: another observer gives one of that name",
        "metric sure is left out: it is a bool, not a number",
    ]


@pytest.mark.slow
def test_a_metric_that_closes_its_model_leaves_the_run_its_device(tmp_path: Path) -> None:
    def answered(model: LoadedModel) -> float:
        with model:
            return float(bool(model.generate(ASKED, max_new_tokens=1)))

    changes = {**SHORT, **rows_in(tmp_path), "training.max_steps": 2, "output_dir": str(tmp_path / "run")}
    result = train(merged(SMALL, changes), metrics={"answered": answered})
    assert logged(result.run_dir, "eval_answered") == [1.0, 1.0]


@pytest.mark.slow
def test_metrics_are_asked_with_validation_rows_in_memory(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(rows_in(tmp_path)["data.path"]).read_text().splitlines()]
    changes = {**SHORT, "training.eval_steps": None, "training.max_steps": 1, "output_dir": str(tmp_path / "run")}
    settings = merged(SMALL, {**changes, "data.path": ""})
    given = {"train": lines[:20], "validation": lines[20:24]}
    result = train(settings, data=given, metrics={"one": lambda model: 1.0})
    assert logged(result.run_dir, "eval_one") == [1.0, 1.0]
    assert resume(result.run_dir, metrics={"one": lambda model: 1.0}).steps == 1


# transformers' callbacks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_early_stopping_of_transformers_ends_a_run(tmp_path: Path) -> None:
    changes = {
        **SHORT,
        **rows_in(tmp_path),
        "output_dir": str(tmp_path / "run"),
        "training.eval_steps": 1,
        "training.max_steps": 12,
        "training.learning_rate": 1e-30,  # nothing gets better
    }
    result = train(merged(SMALL, changes), observers=[as_observer(EarlyStoppingCallback(2))])
    assert (result.stopped_because, result.steps) == ("observer", 2)
    assert result.adapter_dir.is_dir()
    assert resume(result.run_dir).steps == 2


@pytest.mark.slow
def test_callbacks_of_transformers_show_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**SHORT, **rows_in(tmp_path), "output_dir": str(tmp_path / "run")}
    observers = [as_observer(PrinterCallback), as_observer(ProgressCallback())]
    result = train(merged(SMALL, changes), observers=observers, quiet=True)
    shown = capsys.readouterr()
    assert shown.out.count("'loss'") == 4 + 4  # each prints every step
    assert "4/4" in shown.err
    assert result.notes == ()


class Events(TrainerCallback):  # type: ignore[misc]
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self.told.append(f"begin {state.max_steps} {args.learning_rate}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self.told.append(f"epoch {state.epoch:.0f}")

    def on_save(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self.told.append(f"save {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self.told.append("end")


class Peeks(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **facts: Any) -> None:
        model.parameters()


@pytest.mark.slow
def test_a_callback_is_told_the_events_that_exist(tmp_path: Path) -> None:
    rows = {**rows_in(tmp_path), "training.max_steps": None, "training.num_train_epochs": 2, "checkpoint.save_steps": 0}
    changes = {**SHORT, **rows, "training.per_device_train_batch_size": 16, "output_dir": str(tmp_path / "run")}
    events = Events()
    result = train(merged(SMALL, changes), observers=[as_observer(events), as_observer(Peeks())])
    assert events.told == [f"begin {result.steps} 0.002", "epoch 1", "epoch 2", f"save {result.steps}", "end"]
    (note,) = [note for note in result.notes if "observer" in note]
    assert "CallbackObserver) failed in qlora_hal_step_finished and is disabled" in note
    assert "[QH-U43] Peeks uses model, which is the backend's own." in note


def test_a_callback_is_told_of_an_epochs_end_where_one_ends_also_after_a_resume(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"training": {"num_train_epochs": 3}})
    for steps_per_epoch in (1, 3, 7, 49):
        for resumed_at in (0, steps_per_epoch, steps_per_epoch + 2):
            events, total = Events(), 3 * steps_per_epoch
            hooks = Hooks([as_observer(events)])
            run = RunView(tmp_path, config, {}, total, resumed_at)
            hooks.tell("qlora_hal_run_started", run=run)
            for step in range(resumed_at + 1, total + 1):
                facts = {"stats": StepStats(1.0, 1, 1.0), "learning_rate": 1e-3, "epoch": step / steps_per_epoch}
                facts |= {"tokens_per_second": 1.0, "memory_bytes": None}
                hooks.tell("qlora_hal_step_finished", run=run, step=step, **facts)
            ended = [f"epoch {epoch}" for epoch in (1, 2, 3) if epoch * steps_per_epoch > resumed_at]
            assert [told for told in events.told if told.startswith("epoch")] == ended


class ActsInside(TrainerCallback):  # type: ignore[misc]
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        raise AssertionError


@pytest.mark.fault("U43")
def test_callbacks_that_cannot_be_served_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"QH-U43.*ActsInside has on_pre_optimizer_step"):
        as_observer(ActsInside())
    with pytest.raises(UnsupportedFeatureError, match=r"QH-U43.*int is no TrainerCallback"):
        as_observer(5)


def test_a_callback_that_is_not_wrapped_is_answered_with_how_to(tmp_path: Path) -> None:
    settings = merged(SMALL, {"output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"QH-U20.*trainer_callbacks\.as_observer\(callback\)"):
        train(settings, observers=[PrinterCallback()])


PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "python.md"


def test_the_observer_of_the_page_halves_the_rate_on_a_plateau() -> None:
    (example,) = [block for block in re.findall("```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Halve" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    hooks = Hooks([names["HalveOnPlateau"]()])
    asked = [
        hooks.control(run=None, step=step, stats=None, evaluation=LossSum(loss, 1), metrics={})
        for step, loss in enumerate([3.0, 2.0, 2.5, 2.5, 1.0])
    ]
    assert asked == [None, None, None, Control(learning_rate_factor=0.5), None]
    assert hooks.control(run=None, step=1, stats=StepStats(1.0, 1, 1.0), evaluation=None, metrics={}) is None


def test_the_callback_of_the_page_is_an_observer() -> None:
    (example,) = [block for block in re.findall("```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Early" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    assert Hooks([names["observer"]]).steering() == ["observer 1 (CallbackObserver)"]
