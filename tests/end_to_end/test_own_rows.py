"""Runs on rows as users have them: frames, validation rows in memory, several data sets, mlx-lm's folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
from small_runs import SMALL, merged
from stopped_runs import SHORT, StopAfter

from qlora_hal import resume, train
from qlora_hal.demo import data_path
from qlora_hal.errors import ConfigError, StoppedError
from qlora_hal.report.run_file import read_run_config, read_run_file

pytestmark = pytest.mark.usefixtures("usual_signals")

CHATS = [json.loads(line) for line in data_path("train").read_text(encoding="utf-8").splitlines()[:40]]
PAIRS = [{"frage": chat["messages"][-2]["content"], "antwort": chat["messages"][-1]["content"]} for chat in CHATS]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A short run into `folder` without data of its own."""
    own = {key.replace("__", "."): value for key, value in changes.items()}
    tree = merged(SMALL, {**SHORT, "training.eval_steps": None, "output_dir": str(folder), **own})
    if "data.path" not in own:
        del tree["data"]["path"]
    return tree


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_a_frame_is_trained_with_validation_rows_in_memory_and_the_run_goes_on(tmp_path: Path) -> None:
    frame, held = pandas.DataFrame(PAIRS[:30]), pandas.DataFrame(PAIRS[30:])
    tree = settings(
        tmp_path / "run",
        data__columns={"instruction": "frage", "output": "antwort"},
        training__eval_steps=2,
    )
    whole = train({**tree, "output_dir": str(tmp_path / "whole")}, data=frame, validation_data=held)
    with pytest.raises(StoppedError):
        train(tree, data=frame, validation_data=held, observers=[StopAfter(1)])
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tmp_path / "run", moved)
    ended = resume(moved)
    assert ended.eval_loss_after == whole.eval_loss_after is not None
    assert (moved / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole.adapter_dir / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.fault("U01")
def test_evaluations_of_no_rows_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    tree = settings(tmp_path / "run", training__eval_steps=2)
    with pytest.raises(ConfigError, match=r"training\.eval_steps is 2, and there are no validation rows"):
        train(tree, data=CHATS, dry_run=True)
    assert train(tree, data=CHATS[:30], validation_data=CHATS[30:], dry_run=True).plan["sequences"]


def test_rows_in_memory_and_files_of_the_same_purpose_are_noted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = settings(tmp_path / "run", data__sources=[{"path": "a.jsonl"}], data__validation_fraction=0.5)
    train(tree, data=CHATS[:30], validation_data=CHATS[30:], dry_run=True)
    said = capfd.readouterr().err
    assert "data.sources is not read: rows were given in memory" in said
    assert "data.validation_fraction is not used: validation rows were given in memory" in said


@pytest.mark.slow
def test_a_run_of_several_sources_goes_on_exactly_where_its_files_are_moved(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "in/a.jsonl", CHATS[:20]), write_rows(tmp_path / "in/b.jsonl", PAIRS[20:])
    sources = [
        {"path": first, "weight": 0.4},
        {"path": second, "weight": 2, "columns": {"instruction": "frage", "output": "antwort"}},
    ]
    whole = train(settings(tmp_path / "whole", data__sources=sources))
    with pytest.raises(StoppedError):
        train(settings(tmp_path / "run", data__sources=sources), observers=[StopAfter(1)])
    shutil.move(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"QH-U18.*data\.sources\.0\.path.*data\.sources\.1\.path") as caught:
        resume(tmp_path / "run")
    assert caught.value.fix.endswith("--data FOLDER")
    ended = resume(tmp_path / "run", data=tmp_path / "out")
    remembered = [source.path for source in read_run_config(tmp_path / "run").data.sources]
    assert remembered == [str(tmp_path / "out/a.jsonl"), str(tmp_path / "out/b.jsonl")]
    assert (ended.adapter_dir / "adapter_model.safetensors").read_bytes() == (
        whole.adapter_dir / "adapter_model.safetensors"
    ).read_bytes()
    report = read_run_file(tmp_path / "run")["data_report"]
    assert isinstance(report, dict)
    assert [one["rows_in_epoch"] for one in report["sources"]] == [5, 28]


@pytest.mark.fault("U18")
def test_sources_of_one_name_are_moved_by_no_folder(tmp_path: Path) -> None:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.run.paths import PathOverrides

    config = RunConfig.model_validate({"data": {"sources": [{"path": "/a/x.jsonl"}, {"path": "/b/x.jsonl"}]}})
    with pytest.raises(ConfigError, match="cannot be told apart by their names"):
        PathOverrides(data=str(tmp_path)).applied(config)


def test_a_folder_as_mlx_lm_has_them_is_trained_and_evaluated_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "data/train.jsonl", CHATS[:30])
    write_rows(tmp_path / "data/valid.jsonl", CHATS[30:])
    write_rows(tmp_path / "data/test.jsonl", CHATS[:5])
    plan = train(settings(tmp_path / "run", data__path=str(tmp_path / "data"), training__eval_steps=2), dry_run=True)
    assert plan.plan["sequences"] <= 30
    said = capfd.readouterr().err
    assert f"data.validation_path is {tmp_path / 'data'}, too: valid.jsonl there holds validation rows" in said
    train(settings(tmp_path / "run", data__path=str(tmp_path / "data/train.jsonl")), dry_run=True)
    assert "data.validation_path" not in capfd.readouterr().err


def test_validation_rows_of_the_configuration_stay_when_the_call_names_none(tmp_path: Path) -> None:
    rows, held = write_rows(tmp_path / "rows.jsonl", CHATS[:30]), write_rows(tmp_path / "held.jsonl", CHATS[30:])
    tree = settings(tmp_path / "run", data__path=rows, data__validation_path=held, training__eval_steps=2)
    assert train(tree, dry_run=True).plan["sequences"]
