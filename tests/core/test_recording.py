"""What is said of the steps as they are written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_hal.contract.values import LossSum
from qlora_hal.hooks import LONGEST_NAME, MOST_FIGURES, Hooks, hookimpl
from qlora_hal.report.console import RunConsole
from qlora_hal.report.metrics import MetricsFile, evaluation_record, read_metrics
from qlora_hal.report.run_file import RunRecord, read_run_file
from qlora_hal.run.callbacks import loss_jump
from qlora_hal.run.directory import RunDirectory
from qlora_hal.run.record import MOST_NOTES, RunRecordFile


@pytest.mark.fault("N16")
def test_loss_that_jumps_is_told_and_one_that_only_varies_is_not() -> None:
    varied = [1.0, 2.0] * 25  # mean 1.5, deviation 0.5: six deviations end at 4.5
    assert loss_jump(varied, 4.4) == ""
    assert loss_jump(varied, 4.6) == "the loss jumped to 4.6000; the 50 steps before had 1.5000 on average"
    assert loss_jump(varied[:49], 100.0) == ""


def test_a_run_that_tells_something_of_each_step_keeps_a_record_that_can_be_read(tmp_path: Path) -> None:
    console = RunConsole(silent=True)
    with RunDirectory.open_new(tmp_path / "run", config={}) as directory:
        record = RunRecordFile(directory, console, RunRecord(config={}, origins={}))
        for step in range(3 * MOST_NOTES):
            console.note(f"step {step}: something")
        record.write()
        record = RunRecordFile(directory, console, record.record)  # a later call adds to what was kept
        record.write()
    notes = read_run_file(tmp_path / "run")["notes"]
    assert isinstance(notes, list)
    told = [f"step {step}: something" for step in range(MOST_NOTES)]
    assert notes == [*told, "there were more notes, which this record leaves out"]


class Measures:
    """Gives what it is given."""

    def __init__(self, figures: dict[str, object]) -> None:
        self._figures = figures

    @hookimpl
    def qlora_hal_metrics(self) -> dict[str, object]:
        return self._figures


def test_as_many_figures_are_kept_as_the_log_can_be_read_with(tmp_path: Path) -> None:
    notes: list[str] = []
    named: dict[str, object] = {f"{number:04}".ljust(LONGEST_NAME, "x"): 0.1 + number for number in range(MOST_FIGURES)}
    strange: dict[str, object] = {"y" * (LONGEST_NAME + 1): 1.0, "huge": 10**400}
    figures = Hooks((Measures({**strange, **named, "one_more": 1.0}),), note=notes.append).measured(
        run=None, step=1, model=None
    )
    assert figures.keys() == named.keys()
    assert [note.split()[1][:8] for note in notes] == ["yyyyyyyy", "huge", "one_more"]
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.append(evaluation_record(1, LossSum(1.0, 1), "before", figures))
    assert [len(record) for record in read_metrics(tmp_path / "metrics.jsonl")] == [MOST_FIGURES + 4]
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        assert metrics.notes == ()


def test_an_estimate_beyond_all_counting_stands_in_a_record_that_can_be_read(tmp_path: Path) -> None:
    estimate = {"total": 10**26, "high": 2**63, "adapter": 2**62}
    with RunDirectory.open_new(tmp_path / "run", config={}) as directory:
        RunRecordFile(
            directory, RunConsole(silent=True), RunRecord(config={}, origins={}, memory_estimate=estimate)
        ).write()
    assert read_run_file(tmp_path / "run")["memory_estimate"] == {"total": 1e26, "high": 2.0**63, "adapter": 2**62}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["memory_estimate"]["adapter"] == 2**62
