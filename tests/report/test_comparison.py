"""Two runs side by side, and the list of runs: finished, at work, interrupted, broken."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.conftest import HOSTILE, run_record, write_metrics
from small_runs import SMALL, merged

from qlora_hal import train
from qlora_hal.cli.__main__ import main
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError
from qlora_hal.report.run_file import write_run_file
from qlora_hal.run.listing import runs_below, summary
from qlora_hal.run.lock import RunLock


@pytest.fixture
def other_run(run_dir: Path) -> Path:
    """Another run beside the first, with another rank."""
    folder = run_dir.parent / "second-run"
    folder.mkdir()
    write_metrics(folder / "metrics.jsonl")
    settings = resolve_settings({"lora": {"r": 32}, "model": {"name_or_path": HOSTILE}}, environ={})
    config = settings.config.model_dump(mode="json")
    write_run_file(folder, replace(run_record(), config=config, resolved={"backend": "cuda_bnb"}, eval_loss_after=0.9))
    return folder


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 0
    return capsys.readouterr().out


def test_settings_that_differ_stand_with_their_origin_and_equal_ones_do_not(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(compared(capsys, str(run_dir), str(other_run), "--json"))
    assert told["settings"] == {"lora.r": {"values": [8, 32], "origins": ["config argument"] * 2}}
    assert told["resolved"]["backend"] == ["cpu_torch", "cuda_bnb"]
    assert told["figures"]["evaluation loss after"] == [1.1, 0.9]
    text = compared(capsys, str(run_dir), str(other_run))
    assert "lora.r  8  (config argument)  32  (config argument)" in text


def test_what_lies_inside_a_setting_has_the_origin_of_the_setting(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, weight in ((run_dir, 2), (other_run, 3)):
        asked = {"data": {"sources": [{"path": "a.csv", "weight": weight}, {"path": "b.csv"}]}}
        settings = resolve_settings(asked, environ={})
        record = replace(run_record(), config=settings.config.model_dump(mode="json"), origins=settings.origins)
        write_run_file(folder, record)
    told = json.loads(compared(capsys, str(run_dir), str(other_run), "--json"))
    assert told["settings"]["data.sources.0.weight"] == {"values": [2.0, 3.0], "origins": ["config argument"] * 2}


def test_a_run_is_not_changed_by_looking_at_it(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}
    compared(capsys, str(run_dir), str(other_run))
    main(["runs", str(run_dir.parent)])
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}
    assert before == after


def test_the_page_has_both_curves_in_one_chart_and_nothing_of_a_stranger_acts_in_it(
    run_dir: Path, other_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "compare.html"
    compared(capsys, str(run_dir), str(other_run), "--page", str(page))
    text = page.read_text(encoding="utf-8")
    first_chart = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])
    assert {path.get("class") for path in first_chart.iter() if path.tag.endswith("path")} >= {"line-a", "line-b"}
    assert "<script>alert" not in text
    assert "first-run" in text
    assert "second-run" in text
    assert len(text) < 150_000
    HTMLParser().feed(text)
    assert main(["compare", str(run_dir), str(other_run), "--page", str(page)]) == 2  # never replaced unasked
    assert "QH-U07" in capsys.readouterr().err


def test_what_is_no_run_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run_dir), str(tmp_path)]) == 2
    assert "QH-S50" in capsys.readouterr().err


def test_all_runs_below_a_folder_are_listed_with_their_figures(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = run_dir.parent / "project" / "monday"
    shutil.copytree(other_run, deeper)
    assert {run.folder for run in runs_below(run_dir.parent)} == {run_dir, other_run, deeper}
    assert main(["runs", str(run_dir.parent), "--json"]) == 0
    told = {Path(run["folder"]).name: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert told["first-run"]["state"] == "finished"
    assert told["first-run"]["backend"] == "cpu_torch"
    assert told["first-run"]["steps"] == 40
    assert told["first-run"]["eval_loss_after"] == 1.1
    assert main(["runs", str(run_dir.parent)]) == 0
    assert "3.0000 -> 1.1000" in capsys.readouterr().out


def test_a_run_at_work_is_told_from_one_that_was_interrupted(run_dir: Path) -> None:
    write_run_file(run_dir, replace(run_record(), status="running", steps=0, resolved={"total_steps": 80}))
    assert summary(run_dir).state == "interrupted"
    lock = RunLock.take(run_dir)
    try:
        found = summary(run_dir)
        assert (found.state, found.steps, found.total_steps) == ("running", 40, 80)  # steps by its log
    finally:
        lock.release()
    assert summary(run_dir).state == "interrupted"


def test_a_run_that_was_refused_before_it_began_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no validation rows"):
        train(merged(SMALL, {"output_dir": str(tmp_path), "training.eval_steps": 2, "data.validation_path": None}))
    assert summary(tmp_path).state == "not started"


@pytest.mark.parametrize(
    ("owner", "state"),
    [
        ({"host": "another-host", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}, "running elsewhere"),
        (
            {
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "since": "2999-01-01T00:00:00+00:00",
                "boot_id": "another",
            },
            "interrupted",
        ),
    ],
)
def test_a_process_of_another_host_or_an_earlier_start_is_not_taken_for_a_living_one(
    run_dir: Path, owner: dict[str, object], state: str
) -> None:
    write_run_file(run_dir, replace(run_record(), status="running"))
    (run_dir / "run.lock.json").write_text(json.dumps(owner))
    assert summary(run_dir).state == state


def test_a_broken_run_is_listed_with_what_is_wrong(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**edited, "steps": 7}))
    torn = run_dir.parent / "torn"
    torn.mkdir()
    (torn / "run.json").write_text("{")
    locked = run_dir.parent / "locked"
    locked.mkdir()
    (locked / "run.lock").touch()
    assert [run.state for run in runs_below(run_dir.parent)] == ["broken"] * 3
    assert main(["runs", str(run_dir.parent)]) == 0
    told = capsys.readouterr().out
    assert "torn is broken: it is damaged" in told
    assert "locked is broken: it is missing" in told
    assert "first-run is broken: it was changed after it was written" in told


def test_a_start_that_was_refused_among_runs_hides_none_of_them(run_dir: Path) -> None:
    above = run_dir.parent
    (above / "report.html").write_text("of someone else")
    with pytest.raises(ConfigError, match="no run of qlora_hal"):
        train(merged(SMALL, {"output_dir": str(above)}))
    assert (above / "run.lock").exists()
    assert [run.folder for run in runs_below(above)] == [run_dir]


def test_a_run_in_the_folder_of_others_hides_none_of_them(run_dir: Path) -> None:
    write_run_file(run_dir.parent, replace(run_record(), status="failed"))
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "step-00000001" / "run.json").write_text("{}")
    assert {run.folder for run in runs_below(run_dir.parent)} == {run_dir, run_dir.parent}


def test_a_link_is_not_followed_and_an_empty_folder_is_said(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "link").symlink_to(run_dir, target_is_directory=True)
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().out


@pytest.mark.fault("U62")
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(ConfigError) as caught:
            runs_below(tmp_path / name)
        assert caught.value.code == "QH-U62"


@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_log_that_is_no_file_is_told_of_the_run(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    log = other_run / "metrics.jsonl"
    log.unlink()
    log.mkdir() if kind == "a folder" else os.mkfifo(log)
    assert main(["compare", str(run_dir), str(other_run)]) == 2
    told = capsys.readouterr().err
    assert "error[QH-S50]" in told
    assert "metrics.jsonl cannot be read" in told


@pytest.mark.fault("X06")
def test_a_log_is_not_read_through_a_link(run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = other_run / "metrics.jsonl"
    log.unlink()
    log.symlink_to(run_dir / "metrics.jsonl")
    assert main(["compare", str(run_dir), str(other_run)]) == 10
    assert "error[QH-X06]" in capsys.readouterr().err


def test_the_way_on_can_be_pasted_where_a_folder_has_spaces(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir.parent / "a run's folder"
    folder.mkdir()
    write_run_file(folder, replace(run_record(), status="running"))
    assert main(["runs", str(folder.parent)]) == 0
    command = capsys.readouterr().out.rpartition("qlora-hal ")[2]
    assert shlex.split(command) == ["resume", str(folder)]
