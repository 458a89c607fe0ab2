"""A run goes on from its own checkpoints and gives its own adapter; what comes from elsewhere is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import (
    adapter_bytes,
    copied,
    newest,
    record,
    resumed,
    rewritten,
    rows_in,
    stopped_run,
    whole_run,
)

from qlora_hal import TrainResult, resume
from qlora_hal.demo import model_path
from qlora_hal.errors import AdapterError, CheckpointError, UnsafeInputError
from qlora_hal.run.identity import config_hash


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return rows_in(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def whole(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", rows)


@pytest.fixture(scope="module")
def stopped(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory.mktemp("stopped") / "run", rows)


@pytest.fixture(scope="module")
def other(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another seed, stopped a step later."""
    return stopped_run(tmp_path_factory.mktemp("other") / "run", rows, {"training.seed": 8}, after=2)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return copied(stopped, tmp_path / "run")


def test_a_stopped_run_goes_on_to_the_bits_of_one_that_never_stopped(
    run: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    result, said = resumed(run, capsys)
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)
    assert "cannot be verified" not in said
    assert "metrics.jsonl lacks" not in said
    assert "metrics.jsonl was" not in said


@pytest.mark.fault("C20")
def test_the_checkpoint_of_another_run_is_refused_and_what_differs_is_named(
    run: Path, other: Path, whole: TrainResult, tmp_path: Path
) -> None:
    foreign = run / "checkpoints" / newest(other).name
    assert foreign.name > newest(run).name
    shutil.copytree(newest(other), foreign)
    before = (run / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another run") as refused:
        resume(run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C20", 9)
    assert "training.seed (there 8, here 7)" in refused.value.message
    assert foreign.name in refused.value.fix
    assert (run / "run.json").read_bytes() == before
    shutil.move(foreign, tmp_path)  # what the message says to do
    assert adapter_bytes(resume(run).adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.fault("C20")
def test_settings_that_were_edited_are_named_with_both_values(run: Path, whole: TrainResult) -> None:
    untouched = (run / "run.json").read_bytes()

    def faster(content: dict[str, Any]) -> None:
        content["config"]["training"]["learning_rate"] = 0.1

    rewritten(run, faster, seal=False)
    with pytest.raises(CheckpointError, match="not the one that the run began with") as refused:
        resume(run)
    assert refused.value.code == "QH-C20"
    assert "training.learning_rate (there 0.002, here 0.1)" in refused.value.message

    def faster_with_its_hash(content: dict[str, Any]) -> None:
        faster(content)
        content["config_hash"] = config_hash(content["config"])

    rewritten(run, faster_with_its_hash)
    with pytest.raises(
        CheckpointError, match=r"settings other than those in run\.json: training\.learning_rate"
    ) as refused:
        resume(run)
    assert refused.value.code == "QH-C20"
    (run / "run.json").write_bytes(untouched)
    assert adapter_bytes(resume(run).adapter_dir) == adapter_bytes(whole.adapter_dir)


def test_a_run_whose_model_and_data_moved_goes_on_from_any_of_its_checkpoints(
    run: Path, rows: dict[str, str], whole: TrainResult, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    shutil.copytree(model_path(), there)
    moved = {"data": "data.path", "validation_data": "data.validation_path"}
    places = {name: shutil.copy(rows[setting], there) for name, setting in moved.items()}
    finished = resume(run, model=there, **places)
    assert adapter_bytes(finished.adapter_dir) == adapter_bytes(whole.adapter_dir)
    shutil.rmtree(newest(run))  # the one before was saved when model and data lay elsewhere
    assert record(run)["config"]["model"]["name_or_path"] == str(there)
    assert adapter_bytes(resume(run).adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.fault("C04")
def test_the_adapter_of_another_run_inside_a_checkpoint_is_found_out(
    run: Path, other: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter_model.safetensors", "qlora_hal.json"):
        shutil.copy(newest(other) / name, newest(run) / name)
    result, said = resumed(run, capsys)
    assert "adapter_model.safetensors does not match its hash" in said
    assert "resumed from step 1" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.fault("C22")
def test_the_adapter_of_another_run_is_not_opened_as_this_runs_and_is_written_again(
    whole: TrainResult, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_hal.inference.generate import open_generation

    run = copied(whole.run_dir, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    shutil.copytree(other / "best_adapter", run / "adapter")
    with pytest.raises(AdapterError, match="it belongs to another run") as refused:
        open_generation(run_dir=run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C22", 5)
    _, said = resumed(run, capsys)
    assert "the run has ended, but adapter is not what it wrote there: it belongs to another run" in said
    assert adapter_bytes(run / "adapter") == adapter_bytes(whole.adapter_dir)
    (aside,) = run.glob(".damaged-adapter-*")
    assert adapter_bytes(aside) == adapter_bytes(other / "best_adapter")
    open_generation(run_dir=run).close()
    # Somewhere else in the folder it is any adapter beside a model, and not this run's.
    aside.rename(run / "theirs")
    open_generation(adapter_dir=run / "theirs", model=str(model_path())).close()


@pytest.mark.fault("C22")
def test_the_best_adapter_of_another_run_does_not_become_this_runs(
    run: Path, other: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "best_adapter")
    shutil.copytree(other / "best_adapter", run / "best_adapter")
    result, said = resumed(run, capsys)
    assert "best_adapter is not what this run wrote there: it belongs to another run" in said
    assert "best_adapter was written again from the checkpoint of step" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.fault("S26")
def test_the_log_of_another_run_is_set_aside_and_its_curve_is_not_shown(
    run: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(other / "metrics.jsonl", run / "metrics.jsonl")
    result, said = resumed(run, capsys)
    assert "metrics.jsonl belonged to another run; it is kept as .damaged-metrics.jsonl-" in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > 2
    assert result.steps == 4
    assert "tokens_per_second" not in record(run)["timings"]
    (aside,) = run.glob(".damaged-metrics.jsonl-*")
    assert aside.read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.fault("X06")
def test_an_adapter_behind_a_link_in_the_runs_folder_is_not_opened(whole: TrainResult, tmp_path: Path) -> None:
    from qlora_hal.inference.generate import open_generation

    run = copied(whole.run_dir, tmp_path / "run")
    (run / "adapter").rename(tmp_path / "elsewhere")
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match="symbolic link") as refused:
        open_generation(run_dir=run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-X06", 10)
