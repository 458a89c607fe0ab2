"""`train --smoke`, and flags that each do something in the place of the run."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from rank_runs import quick, settings_file

from qlora_hal import train
from qlora_hal.cli.__main__ import main
from qlora_hal.run.directory import RunDirectory

CODE = ("--model.trust_remote_code", "true", "--model.revision", "a" * 40)
"""Who gives this permission gives it to the whole command. The model brings no code."""


def of_one_step(folder: Path) -> dict[str, object]:
    return quick(folder, **{"training.max_steps": 1, "training.global_batch_size": None})


@pytest.mark.fault("S13")
def test_a_smoke_test_leaves_an_earlier_run_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with RunDirectory.open_new(run, config=of_one_step(run)):
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"trained")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    file = settings_file(of_one_step(tmp_path / "other"))
    assert main(["train", str(file), "--smoke", "--output_dir", str(run)]) == 2
    assert "error[QH-S13]" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_smoke_test_honors_the_flags_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, named = tmp_path / "run", tmp_path / "smoke"
    file = str(settings_file(of_one_step(run)))
    assert main(["train", file, "--smoke", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "step 1/3" not in said
    assert "stopped and resumed after step" in said
    assert not run.exists(), "the folder of a settings file is for the run itself"

    train(of_one_step(named), quiet=True)
    assert main(["train", file, "--smoke", "--output_dir", str(named), "--overwrite", "--verify", "--json", *CODE]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] is True
    record = json.loads((named / "run.json").read_text())
    assert record["steps"] == 3
    assert record["model"]["files"], "--verify hashes the model's files"


@pytest.mark.fault("U04")
@pytest.mark.parametrize(
    "flags", list(combinations(("--print-config", "--show-batch", "--smoke", "--dry-run"), 2)), ids="+".join
)
def test_flags_that_each_take_the_place_of_the_run_exclude_one_another(
    flags: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(settings_file(of_one_step(run))), *flags, "--output_dir", str(run)]) == 2
    assert f"{' and '.join(flags)} are mutually exclusive" in capsys.readouterr().err
    assert not run.exists()
