"""run.json: what is known of a run is written at once, and no failure, kill or resume takes it away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, resume, train
from qlora_hal.checkpoint import checkpoints, load_checkpoint
from qlora_hal.checkpoint.faults import InjectedFault, forget_passes
from qlora_hal.demo import data_path
from qlora_hal.errors import CheckpointError, StoppedError
from qlora_hal.files.sealed_json import sealed
from qlora_hal.hooks import hookimpl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("usual_signals")]

KEPT = ("resolved", "model", "versions", "detection", "data_report", "started_at", "samples")


class StopAfter:
    def __init__(self, last: int) -> None:
        self._last = last

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        if step == self._last:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    return file


@pytest.fixture
def settings(tmp_path: Path, validation: Path) -> dict[str, Any]:
    changes = {
        "output_dir": str(tmp_path / "run"),
        "data.validation_path": str(validation),
        "training.sample_prompts": ["What does the command tail do?"],
        "checkpoint.save_steps": 2,
    }
    return merged(SMALL, changes)


def record(run_dir: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(run_dir) / "run.json").read_text())
    return content


def evaluations(run_dir: str | Path) -> list[str]:
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["label"] for line in lines if "label" in line]


def killed(config: dict[str, Any], faults: str) -> None:
    program = f"import json\nfrom qlora_hal import train\ntrain(json.loads({json.dumps(config)!r}))"
    environment = {**os.environ, "QLORA_HAL_FAULTS": faults}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def test_failure_keeps_all_that_was_known(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forget_passes()
    monkeypatch.setenv("QLORA_HAL_FAULTS", "ckpt.before_first_write:raise@2")
    with pytest.raises(InjectedFault):
        train(settings)
    found = record(settings["output_dir"])
    assert (found["status"], found["stopped_because"]) == ("failed", "InjectedFault")
    assert all(found[name] for name in KEPT)
    assert found["resolved"]["backend"] == "cpu_torch"
    assert (found["steps"], found["finished_at"] != "") == (4, True)
    assert found["tokens"] > 0
    assert found["eval_loss_before"] > 0
    assert found["samples"][0]["before"]
    assert found["timings"]["train_seconds"] < found["timings"]["wall_seconds"]
    assert "failed: InjectedFault" in (Path(settings["output_dir"]) / "report.html").read_text()


@pytest.mark.long
def test_killed_run_keeps_the_loss_before_training(settings: dict[str, Any]) -> None:
    killed(settings, "ckpt.before_first_write:kill@2")
    found = record(settings["output_dir"])
    assert (found["status"], found["steps"]) == ("running", 4)
    before = found["eval_loss_before"]
    result = resume(settings["output_dir"])
    assert result.eval_loss_before == before > 0
    assert record(settings["output_dir"])["eval_loss_before"] == before
    assert evaluations(settings["output_dir"]) == ["before", "after"]


@pytest.mark.long
def test_loss_before_training_is_found_in_the_log_where_the_record_lost_it(settings: dict[str, Any]) -> None:
    with pytest.raises(StoppedError):
        train(settings, observers=[StopAfter(1)])
    path = Path(settings["output_dir"]) / "run.json"
    before = record(path.parent)["eval_loss_before"]
    path.write_text(json.dumps(sealed({**record(path.parent), "eval_loss_before": None})))
    assert resume(path.parent).eval_loss_before == before > 0


def test_refused_resume_leaves_the_record_as_it_was(settings: dict[str, Any], validation: Path) -> None:
    with pytest.raises(StoppedError):
        train(settings, observers=[StopAfter(1)])
    path = Path(settings["output_dir"]) / "run.json"
    before = path.read_bytes()
    other = validation.with_name("other.jsonl")
    other.write_text(validation.read_text().splitlines()[0] + "\n")
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        resume(path.parent, data=other)
    assert path.read_bytes() == before


@pytest.mark.fault("C20")
def test_edited_configuration_is_not_resumed(settings: dict[str, Any]) -> None:
    with pytest.raises(StoppedError):
        train(settings, observers=[StopAfter(1)])
    path = Path(settings["output_dir"]) / "run.json"
    whole = record(path.parent)
    edited = {**whole["config"], "training": {**whole["config"]["training"], "max_steps": 600}}
    path.write_text(json.dumps({**whole, "config": edited}))
    with pytest.raises(CheckpointError, match="not the one that the run began with") as refused:
        resume(path.parent)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C20", 9)
    path.write_text(json.dumps(whole))
    assert resume(path.parent).steps == 6


@pytest.mark.long
def test_resumed_run_sums_its_times_and_keeps_its_start(settings: dict[str, Any]) -> None:
    with pytest.raises(StoppedError):
        train(settings, observers=[StopAfter(2)])
    first = record(settings["output_dir"])
    result = resume(settings["output_dir"])
    both = record(settings["output_dir"])
    assert both["started_at"] == first["started_at"]
    assert both["timings"]["wall_seconds"] == pytest.approx(first["timings"]["wall_seconds"] + result.wall_seconds, 0.2)
    assert both["timings"]["wall_seconds"] > first["timings"]["wall_seconds"]
    lines = map(json.loads, (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines())
    seconds = sum(line["seconds_per_step"] for line in lines if "loss" in line)
    assert both["timings"]["train_seconds"] == pytest.approx(seconds)
    assert both["timings"]["tokens_per_second"] == pytest.approx(both["tokens"] / seconds)
    assert any("SIGINT" in note for note in both["notes"])
    assert any("resumed from step" in note for note in both["notes"])


def test_finished_run_has_nothing_left_to_do_and_its_record_stays(
    settings: dict[str, Any], validation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even its data need be there still."""
    done = train(settings)
    validation.unlink()
    before = {name: (done.run_dir / name).read_bytes() for name in ("run.json", "metrics.jsonl", "report.html")}
    capsys.readouterr()
    again = resume(done.run_dir)
    shown = " ".join(capsys.readouterr().err.split())
    assert "already finished: the run ended after step 6" in shown
    assert "? tok/s" not in shown
    assert {name: (done.run_dir / name).read_bytes() for name in before} == before
    for name in ("steps", "tokens", "eval_loss_before", "eval_loss_after", "adapter_dir", "stopped_because"):
        assert getattr(again, name) == getattr(done, name)


@pytest.mark.long
def test_run_killed_between_its_last_evaluation_and_its_end_has_one_evaluation_after(settings: dict[str, Any]) -> None:
    """What a kill there leaves: the adapter is missing, the log has the last evaluation, the status is running."""
    done = train(settings)
    shutil.rmtree(done.adapter_dir)
    path = done.run_dir / "run.json"
    path.write_text(json.dumps({**record(done.run_dir), "status": "running", "adapter_dir": ""}))
    again = resume(done.run_dir)
    assert again.eval_loss_after == done.eval_loss_after
    assert evaluations(done.run_dir) == ["before", "after"]
    assert record(done.run_dir)["status"] == "finished"


def hopeless(settings: dict[str, Any]) -> dict[str, Any]:
    """A learning rate at which every evaluation is worse than the one before."""
    changes = {
        "training.max_steps": 12,
        "training.learning_rate": 0.05,
        "training.lr_scheduler_type": "constant",
        "training.eval_steps": 1,
        "training.early_stopping_patience": 1,
        "checkpoint.save_steps": None,
    }
    return merged(settings, changes)


def test_early_stopping_ends_a_run_for_good(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    done = train(hopeless(settings))
    shown = capsys.readouterr().err
    assert done.stopped_because == "early stopping"
    assert done.steps < 12
    assert "qlora-hal chat --run" in shown
    assert "qlora-hal resume" not in shown
    again = resume(done.run_dir)
    assert (again.steps, again.stopped_because) == (done.steps, "early stopping")
    assert f"the run ended by early stopping after step {done.steps}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_early_stopping_outlives_a_kill(settings: dict[str, Any]) -> None:
    """The process dies as soon as the state of the stop is saved: the resume judges and writes, and trains no more."""
    killed(hopeless(settings), "ckpt.after_rename:kill@1")
    run_dir = Path(settings["output_dir"])
    ((saved, _),) = checkpoints(run_dir)
    result = resume(run_dir)
    assert (result.steps, result.stopped_because, result.losses) == (saved, "early stopping", ())
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()
    assert any("no further step is taken" in note for note in result.notes)
    assert evaluations(run_dir).count("after") == 1


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_best_adapter_on_the_way_is_the_one_that_stays(settings: dict[str, Any]) -> None:
    result = train(merged(hopeless(settings), {"training.load_best_adapter_at_end": True}))
    lines = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["eval_loss"] for line in lines if line.get("label") in ("during", "after")}
    best = min(losses, key=lambda step: losses[step])
    assert best < result.steps
    assert result.eval_loss_after == losses[best]
    assert tensors(result.adapter_dir) == tensors(result.run_dir / "best_adapter")
    assert json.loads((result.adapter_dir / "qlora_hal.json").read_text())["step"] == best


@pytest.mark.long
def test_best_adapter_that_was_replaced_is_not_taken_for_another_step(settings: dict[str, Any]) -> None:
    """As where a lost part of the run had found a better one, and went otherwise when it was done anew."""
    killed(merged(hopeless(settings), {"training.load_best_adapter_at_end": True}), "ckpt.after_rename:kill@1")
    run_dir = Path(settings["output_dir"])
    provenance = run_dir / "best_adapter" / "qlora_hal.json"
    provenance.write_text(json.dumps(sealed({**json.loads(provenance.read_text()), "step": 11})))
    result = resume(run_dir)
    assert any("replaced it by that of step 11" in note for note in result.notes)
    assert tensors(result.adapter_dir) != tensors(run_dir / "best_adapter")


def test_adapter_that_is_worse_than_its_base_is_said(settings: dict[str, Any]) -> None:
    result = train(hopeless(settings))
    assert result.eval_loss_after is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss_after > result.eval_loss_before
    (note,) = (note for note in result.notes if "worse than the base" in note)
    assert f"{result.eval_loss_before:.4f} before training" in note
    assert note in record(result.run_dir)["notes"]


@pytest.mark.fault("D02")
def test_fewer_rows_than_one_step_takes_are_said_and_recorded(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(data_path("train").read_text().splitlines(keepends=True)[:3]))
    changes = {"data.path": str(rows), "data.truncation": "right", "training.max_steps": 2}
    result: TrainResult = train(merged(SMALL, {**changes, "output_dir": str(tmp_path / "run")}))
    told = "3 sequences are fewer than the 8 of one step"
    assert any(told in note for note in result.notes)
    assert any(told in note for note in record(result.run_dir)["notes"])


def test_checkpoint_knows_the_epoch_it_was_saved_in(settings: dict[str, Any]) -> None:
    result = train(settings)
    lines = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    epochs = {line["step"]: line["epoch"] for line in lines if "loss" in line}
    found = {step: load_checkpoint(path).epoch for step, path in checkpoints(result.run_dir)}
    assert found == {step: epochs[step] for step in found}
    assert found[6] > 0


@pytest.mark.fault("X11")
def test_a_resume_says_which_settings_the_record_does_not_hold_as_they_were_given(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    settings["training"]["sample_prompts"] = ["How is postgres started?"]
    with pytest.raises(StoppedError):
        train(settings, observers=[StopAfter(2)])
    resumed = resume(settings["output_dir"])
    assert [sample["prompt"] for sample in resumed.samples] == ["How is [removed] started?"]
    told = "training.sample_prompts: what looked like a secret is not in run.json, and [removed] stands in its place"
    assert told in resumed.notes
