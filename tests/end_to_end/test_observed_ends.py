"""Observers hear of the end of every run whose start they heard of: as finished or as failed, never as both."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, train
from qlora_hal.checkpoint.faults import InjectedFault, forget_passes
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.errors import BackendError, StoppedError
from qlora_hal.hooks import hookimpl
from qlora_hal.run.result import RunView

pytestmark = pytest.mark.usefixtures("usual_signals")


class Heard:
    """What was told of start and end, with the status that run.json had then. Stops the run after `stop_after`."""

    def __init__(self, stop_after: int = 0) -> None:
        self.told: list[tuple[str, str]] = []
        self._stop_after = stop_after

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        self._hear("started", run)

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        if step == self._stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    @hookimpl
    def qlora_hal_run_finished(self, run: RunView, result: TrainResult) -> None:
        self._hear("finished", run)

    @hookimpl
    def qlora_hal_run_failed(self, run: RunView, error: BaseException) -> None:
        assert (run.run_dir / "report.html").is_file()
        self._hear(f"failed by {type(error).__name__}", run)

    def _hear(self, what: str, run: RunView) -> None:
        self.told.append((what, json.loads((run.run_dir / "run.json").read_text())["status"]))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    changes = {"training.max_steps": 3, "checkpoint.save_steps": 1, "output_dir": str(tmp_path / "run")}
    return merged(SMALL, changes)


def test_a_run_that_fails_is_told_as_failed_when_its_record_and_report_are_written(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_passes()
    monkeypatch.setenv("QLORA_HAL_FAULTS", "ckpt.before_first_write:raise@2")
    heard = Heard()
    with pytest.raises(InjectedFault):
        train(settings, observers=[heard])
    assert heard.told == [("started", "running"), ("failed by InjectedFault", "failed")]


def test_a_run_that_never_began_has_no_end_to_tell(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckedTrainer, *facts: object) -> None:
        raise BackendError("QH-B04", "The device is gone.", fix="Nothing, it is a test.")

    monkeypatch.setattr(CheckedTrainer, "load", refuse)
    heard = Heard()
    with pytest.raises(BackendError, match="device is gone"):
        train(settings, observers=[heard])
    assert heard.told == []


def test_a_run_that_ends_by_itself_or_is_stopped_has_not_failed(settings: dict[str, Any]) -> None:
    whole, stopped = Heard(), Heard(stop_after=1)
    train(settings, observers=[whole])
    with pytest.raises(StoppedError):
        train({**settings, "output_dir": settings["output_dir"] + "-stopped"}, observers=[stopped])
    assert whole.told == [("started", "running"), ("finished", "finished")]
    assert stopped.told == [("started", "running"), ("finished", "stopped")]
