"""run.json: what enters, and what never does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_hal.errors import ConfigError
from qlora_hal.report.run_file import (
    Detection,
    RunRecord,
    read_run_config,
    read_run_file,
    record_from,
    redacted,
    run_facts,
    write_run_file,
)
from qlora_hal.settings import resolve_settings


def record_of(settings_tree: dict[str, object]) -> RunRecord:
    settings = resolve_settings(settings_tree, environ={})
    return RunRecord(config=settings.config.model_dump(mode="json"), origins=settings.origins)


def test_a_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    home = Path.home()
    tree: dict[str, object] = {
        "output_dir": str(home / "runs" / "a"),
        "model": {"name_or_path": str(home / "models" / "m")},
        "training": {"sample_prompts": ["What is ~/ in a path?"]},
    }
    write_run_file(tmp_path, record_of(tree))
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert str(home) not in text
    assert "~/models/m" in text
    assert read_run_config(tmp_path) == resolve_settings(tree, environ={}).config


@pytest.mark.fault("X11")
def test_tokens_never_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {
        "HF_TOKEN": "canary-hub-1234567",
        "WANDB_API_KEY": "canary-wandb-1234567",
        "MY_SECRET": "canary-secret-1234567",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    patterned = "hf_abcdefghijklmnop1234"
    record = replace(
        record_of({"data": {"path": f"https://user:pass-word@host/{canaries['HF_TOKEN']}"}}),
        notes=(f"used {canaries['WANDB_API_KEY']}", patterned),
        environment={"api_key": "plain-canary", "nested": {"text": canaries["MY_SECRET"]}},
    )
    write_run_file(tmp_path, record)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    for secret in (*canaries.values(), patterned, "plain-canary", "pass-word"):
        assert secret not in text
    assert "[removed]" in text


def test_the_home_folder_is_shortened_only_where_it_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    said = redacted(["/home/ada", "/home/ada/x", "in /home/ada/x, y", "/home/adam/x", "/srv/home/ada/x"], secrets=())
    assert said == ["~", "~/x", "in ~/x, y", "/home/adam/x", "/srv/home/ada/x"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write_run_file(tmp_path, replace(record_of({}), eval_loss_after=math.nan))
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["eval_loss_after"] is None


def test_writing_again_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    record = record_of({})
    write_run_file(tmp_path, record)
    write_run_file(tmp_path, replace(record, status="finished"))
    assert read_run_file(tmp_path)["status"] == "finished"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = replace(
        record_of({"lora": {"r": 4}}),
        detection=Detection("cpu_torch", "named", ({"backend": "cpu_torch"},), {"cuda_bnb": "no driver"}),
        notes=("one", "two"),
        samples=({"prompt": "p", "before": "b", "after": "a"},),
        timings={"train_seconds": 1.5},
    )
    write_run_file(tmp_path, record)
    again = record_from(read_run_file(tmp_path))
    assert run_facts(again) == run_facts(record)
    assert (again.notes, again.detection) == (record.notes, record.detection)


@pytest.mark.fault("S50")
@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": 3}'])
def test_a_folder_without_a_whole_run_json_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run folder: run\.json does not serve") as caught:
        read_run_config(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("QH-S50", 2)
