"""metrics.jsonl under crashes, NaN and resumes."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path

import pytest

from qlora_hal.contract.values import LossSum, StepStats
from qlora_hal.errors import StorageError
from qlora_hal.report.metrics import (
    MetricsFile,
    Smoother,
    evaluation_record,
    loss_before,
    read_metrics,
    smoothed,
    step_record,
    trained_seconds,
)
from qlora_hal.report.series import read_series


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_reaches_the_system_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"step": 1, "loss": 2.5})
    assert lines_of(path) == [{"step": 1, "loss": 2.5}]
    metrics.close()
    metrics.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_and_marked(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.append({"step": 1, "loss": value, "grad_norm": 1.0})
    assert lines_of(path) == [{"step": 1, "loss": None, "grad_norm": 1.0, "nonfinite": True}]


@pytest.mark.fault("S26")
@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00" * 40, b"\x00" * 40 + b"\n", b"\xff\n"])
def test_a_torn_last_line_is_dropped_with_a_note(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + torn)
    with MetricsFile(path) as metrics:
        assert metrics.notes == (f"metrics.jsonl: the last line was torn ({len(torn)} bytes); it was dropped.",)
        metrics.append({"step": 3})
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]


def test_a_whole_file_is_opened_without_a_note(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    with MetricsFile(path) as metrics:
        assert metrics.notes == ()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_resume_drops_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in (0, 1, 2, 3, 4):
            metrics.append({"step": step})
        assert metrics.truncate_after(2) == 2
        assert metrics.truncate_after(2) == 0
        metrics.append({"step": 3, "again": True})
    assert lines_of(path) == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_drops_the_evaluation_of_an_end_that_was_none(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        for step, label in ((0, "before"), (2, "during"), (2, "after")):
            metrics.append(evaluation_record(step, LossSum(3.0, 2), label))
        assert metrics.truncate_after(2) == 1
    assert [line["label"] for line in lines_of(metrics.path)] == ["before", "during"]
    assert loss_before(metrics.path) == 1.5


def test_the_seconds_of_all_steps_are_summed_from_the_log(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.append(evaluation_record(0, LossSum(3.0, 2), "during"))
        for step, seconds in ((1, 0.5), (2, 0.25)):
            metrics.append({"step": step, "loss": 1.0, "seconds_per_step": seconds})
    assert trained_seconds(metrics.path) == 0.75
    assert loss_before(metrics.path) is None
    assert trained_seconds(tmp_path / "absent.jsonl") == 0


def test_reading_leaves_torn_lines_out_and_an_absent_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1}\n[]\n{"st')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.fault("S12")
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError) as caught:
        MetricsFile(tmp_path / "file" / "metrics.jsonl")
    assert caught.value.exit_status == 8


@pytest.mark.fault("S11")
@pytest.mark.skipif(sys.platform != "linux", reason="needs a device that fsync refuses")
def test_a_refused_flush_is_a_storage_error_and_the_file_is_closed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with open("/dev/null", "wb") as device:
        os.dup2(device.fileno(), metrics._file.fileno())
    with pytest.raises(StorageError, match=r"QH-S11.*log metrics.jsonl"):
        metrics.sync()
    with pytest.raises(StorageError, match="QH-S11"):
        metrics.close()
    metrics.close()


def test_a_step_record_holds_the_mean_loss_per_counted_token() -> None:
    record = step_record(
        3,
        StepStats(loss_sum=12.0, token_count=8, grad_norm=0.25),
        learning_rate=1e-4,
        epoch=0.5,
        tokens_seen=30,
        tokens_per_second=10.0,
        seconds_per_step=1.0,
        memory_bytes=None,
    )
    assert (record["step"], record["loss"], record["token_count"], record["applied"]) == (3, 1.5, 8, True)


def test_the_average_of_a_constant_is_the_constant_from_the_first_step() -> None:
    # Bias correction divides by 1 - w^n, which the sum of the weights equals exactly: only rounding remains.
    assert smoothed([2.0, None, 2.0]) == [pytest.approx(2.0, abs=1e-12), None, pytest.approx(2.0, abs=1e-12)]


def test_the_average_passes_over_a_value_that_is_not_finite() -> None:
    smoother = Smoother()
    smoother.add(2.0)
    assert smoother.add(math.nan) == pytest.approx(2.0, abs=1e-12)


def test_a_step_logged_twice_counts_once_with_its_last_line(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        for loss in (3.0, math.nan, 2.0):
            metrics.append({"step": 1, "loss": loss})
        metrics.append({"step": 2, "loss": math.nan})
        metrics.append({"step": 2, "eval_loss": 1.5})
    series = read_series(tmp_path)
    assert series.loss == [(1.0, 2.0)]
    assert series.eval_loss == [(2.0, 1.5)]
    assert series.nonfinite_steps == (2,)


def test_a_log_is_as_readable_as_its_folder_after_a_repair(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\ntorn')
    fresh = tmp_path / "fresh"
    fresh.touch()
    MetricsFile(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)


def test_a_number_that_no_step_can_take_is_left_out_of_their_time(tmp_path: Path) -> None:
    lines = [
        f'{{"step": {step}, "loss": 1.0, "seconds_per_step": {took}}}' for step, took in enumerate((1, 2.5, 10**400))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert trained_seconds(tmp_path / "metrics.jsonl") == 3.5
