"""Runs that were begun before there were ids and hashes go on as they did, and what cannot be verified is said."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from stopped_runs import (
    adapter_bytes,
    as_of_an_earlier_release,
    copied,
    newest,
    record,
    resumed,
    rows_in,
    stopped_run,
    whole_run,
)

from qlora_hal import TrainResult, resume
from qlora_hal.checkpoint.reading import kept_record
from qlora_hal.errors import BackendNotFoundError, CheckpointError
from qlora_hal.inference.generate import open_generation
from qlora_hal.run import identity
from qlora_hal.run.trained_base import storage_of_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return rows_in(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def whole(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", rows)


@pytest.fixture(scope="module")
def stopped(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory.mktemp("stopped") / "run", rows)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return as_of_an_earlier_release(copied(stopped, tmp_path / "run"))


def test_a_run_of_an_earlier_release_goes_on_to_the_same_bits(
    run: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    result, said = resumed(run, capsys)
    assert "belongs to a run that an earlier release began, without an id" in said
    assert "an earlier release wrote it, without a hash" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)
    assert result.eval_loss_after == whole.eval_loss_after
    # It gets no id, so that its older checkpoints stay its own; what it saves from here on can be written again from.
    assert "run_id" not in record(run)
    assert kept_record(newest(run))["config"] == record(run)["config"]
    shutil.rmtree(newest(run))
    (run / "run.json").unlink()
    assert adapter_bytes(resume(run).adapter_dir) == adapter_bytes(whole.adapter_dir)


def test_a_run_with_dropout_of_an_earlier_release_says_that_its_masks_change(
    rows: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(identity, "MASKS", 1)
        stopped = stopped_run(tmp_path / "run", rows, {"lora.dropout": 0.1}, after=2)
    assert "other dropout masks" in resumed(stopped, capsys)[1]


def test_rows_that_another_release_prepares_to_the_same_tokens_are_the_same_data(
    stopped: Path, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing = sys.modules["qlora_hal.data.prepare"]  # the package has a function of the same name
    monkeypatch.setattr(preparing, "_VERSION", preparing._VERSION + 1)
    assert adapter_bytes(resume(copied(stopped, tmp_path / "run")).adapter_dir) == adapter_bytes(whole.adapter_dir)


@pytest.mark.fault("E82")
def test_the_base_of_an_adapter_in_a_format_that_is_not_here_is_not_opened_in_another() -> None:
    with pytest.raises(BackendNotFoundError, match="There is no weight format 'int4_gone'") as refused:
        storage_of_training({"weight_format": "int4_gone", "block_size": 32})
    assert refused.value.code == "QH-E82"


@pytest.mark.fault("C20")
def test_a_checkpoint_of_another_run_is_refused_by_its_seed(run: Path, rows: dict[str, str], tmp_path: Path) -> None:
    other = stopped_run(tmp_path / "other", rows, {"training.seed": 8}, after=2)
    foreign = newest(as_of_an_earlier_release(other))
    shutil.copytree(foreign, run / "checkpoints" / foreign.name)
    with pytest.raises(CheckpointError, match=r"training\.seed \(there 8, here 7\)") as refused:
        resume(run)
    assert refused.value.code == "QH-C20"


def test_an_ended_run_of_an_earlier_release_has_nothing_left_to_do_and_its_adapter_opens_with_a_word(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = as_of_an_earlier_release(copied(whole.run_dir, tmp_path / "run"))
    before = adapter_bytes(run / "adapter")
    assert "already finished" in resumed(run, capsys)[1]
    assert adapter_bytes(run / "adapter") == before
    from qlora_hal.report.console import RunConsole

    open_generation(run_dir=run, console=RunConsole(quiet=True)).close()
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "adapter was written by an earlier release, without a hash: whether it was changed cannot be verified" in said
    )
