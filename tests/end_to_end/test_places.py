"""Where model and data lie: any working directory finds them, a move is told once, what is gone is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, resume, train
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError, DataError
from qlora_hal.hooks import hookimpl

pytestmark = pytest.mark.usefixtures("usual_signals")


class Stop:
    """Ends a run after its first step, as a signal does."""

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        import signal

        if step == 1:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with places relative to a folder, stopped after a step, and then seen from another folder."""
    from qlora_hal.errors import StoppedError

    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(model_path(), here / "model")
    for name in ("train", "validation"):
        (here / f"{name}.jsonl").write_text("".join(data_path(name).read_text().splitlines(keepends=True)[:40]))
    monkeypatch.chdir(here)
    places = {"model.name_or_path": "model", "data.path": "train.jsonl", "data.validation_path": "validation.jsonl"}
    with pytest.raises(StoppedError):
        train(merged(SMALL, {**places, "training.max_steps": 3, "output_dir": "run"}), observers=[Stop()])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return here / "run"


def config_of(run: Path) -> dict[str, dict[str, str]]:
    config: dict[str, dict[str, str]] = json.loads((run / "run.json").read_text())["config"]
    return config


def test_a_run_with_relative_places_goes_on_from_any_working_directory(stopped: Path) -> None:
    assert config_of(stopped)["data"]["path"] == str(stopped.parent / "train.jsonl")
    assert config_of(stopped)["data"]["validation_path"] == str(stopped.parent / "validation.jsonl")
    assert config_of(stopped)["model"]["name_or_path"] == str(stopped.parent / "model")
    assert resume(stopped).steps == 3


@pytest.mark.fault("U18")
def test_moved_places_are_named_with_their_flags_and_remembered_when_given(stopped: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for name in ("model", "train.jsonl", "validation.jsonl"):
        (stopped.parent / name).rename(there / name)
    with pytest.raises(ConfigError, match="QH-U18") as caught:
        resume(stopped)
    assert (caught.value.code, caught.value.exit_status) == ("QH-U18", 2)
    for flag in ("--model DIR", "--data FILE", "--validation-data FILE"):
        assert flag in caught.value.fix
    with pytest.raises(ConfigError, match=r"validation\.jsonl") as caught:
        resume(stopped, model=there / "model", data=there / "train.jsonl")
    assert caught.value.fix == f"Give its new path: qlora-hal resume {stopped} --validation-data FILE"
    moved = {"model": there / "model", "data": there / "train.jsonl", "validation_data": there / "validation.jsonl"}
    assert resume(stopped, **moved).steps == 3  # type: ignore[arg-type]
    assert config_of(stopped)["model"]["name_or_path"] == str(there / "model")
    assert config_of(stopped)["data"]["validation_path"] == str(there / "validation.jsonl")
    assert resume(stopped).steps == 3
    assert answered(stopped)


def answered(run: Path) -> str:
    """What generating from the run says: its model is found by what run.json remembers."""
    from qlora_hal.inference.generate import open_generation

    pair = open_generation(run_dir=run)
    try:
        return pair.answer([{"role": "user", "content": "ls"}], max_new_tokens=4)[1]
    finally:
        pair.close()


@pytest.mark.parametrize("setting", ["data.path", "data.validation_path"])
def test_a_data_file_that_is_missing_is_blamed_on_its_own_setting(setting: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="QH-D50") as caught:
        train(merged(SMALL, {setting: "nowhere.jsonl", "output_dir": str(tmp_path / "run")}))
    assert caught.value.where == setting
    assert setting in caught.value.fix


def test_a_failed_start_and_a_dry_run_leave_the_folder_to_the_next_command(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    planned = train(merged(SMALL, {"output_dir": str(folder)}), dry_run=True)
    assert not folder.parent.exists()
    assert planned.stopped_because == "dry run"
    wrong = merged(SMALL, {"output_dir": str(folder), "lora.target_modules": "qq_proj"})
    with pytest.raises(Exception, match="QH-C07"):
        train(wrong)
    result: TrainResult = train(merged(SMALL, {"output_dir": str(folder), "training.max_steps": 1}))
    assert result.steps == 1


def test_a_dry_run_does_not_touch_an_earlier_run_even_with_overwrite(tmp_path: Path) -> None:
    changes = {"output_dir": str(tmp_path / "run"), "training.max_steps": 1}
    train(merged(SMALL, changes))
    before = sorted(str(path) for path in (tmp_path / "run").rglob("*"))
    train(merged(SMALL, {**changes, "lora.r": 4}), dry_run=True, overwrite=True)
    assert sorted(str(path) for path in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(ConfigError, match=r"QH-S13.*1 key differs: lora"):
        train(merged(SMALL, {**changes, "lora.r": 4}), dry_run=True)


def test_rows_with_line_separators_are_resumed(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data_path("train").read_text().splitlines()[:20]]
    rows[3]["messages"][-1]["content"] += "line\u2028separator \x85 and \x0b others"
    tree = merged(SMALL, {"output_dir": str(tmp_path / "run"), "training.max_steps": 2})
    del tree["data"]["path"]
    train(tree, data=(row for row in rows))
    assert resume(tmp_path / "run").steps == 2


def test_settings_without_a_meaning_are_noted(tmp_path: Path) -> None:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.run.start import idle_settings

    tree = merged(SMALL, {"data.split": "test", "model.revision": "main", "output_dir": str(tmp_path / "run")})
    notes = " ".join(idle_settings(RunConfig.model_validate(tree), has_rows=False))
    assert "model.revision" in notes
    assert "data.split" in notes
    assert list(idle_settings(RunConfig.model_validate(SMALL), has_rows=False)) == []
    assert "data.path" in " ".join(idle_settings(RunConfig.model_validate(SMALL), has_rows=True))


def test_settings_that_others_overrule_are_noted_where_they_were_given() -> None:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.run.start import idle_settings

    config = RunConfig.model_validate(merged(SMALL, {"training.max_steps": 3, "training.warmup_steps": 1}))
    named = [
        "training.num_train_epochs",
        "training.warmup_ratio",
        "training.per_device_eval_batch_size",
        "training.load_best_adapter_at_end",
    ]
    notes = list(idle_settings(config, named, has_rows=False))
    assert [note.partition(" is not used")[0] for note in notes] == named
    assert list(idle_settings(config, ["training.max_steps", "training.warmup_steps"], has_rows=False)) == []
    held_out = config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.1})})
    assert len(list(idle_settings(held_out, named, has_rows=False))) == 2


@pytest.mark.parametrize(
    ("checkpointing", "recompute", "told"),
    [(True, "auto", True), (False, "selective", True), (True, "full", False), (False, "none", False)],
)
def test_checkpointing_that_recompute_overrules_is_noted(checkpointing: bool, recompute: str, told: bool) -> None:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.run.start import idle_settings

    changes = {"training.gradient_checkpointing": checkpointing, "training.recompute": recompute}
    config = RunConfig.model_validate(merged(SMALL, changes))
    notes = list(idle_settings(config, ["training.gradient_checkpointing"], has_rows=False))
    assert [note.partition(" is not used")[0] for note in notes] == ["training.gradient_checkpointing"] * told
    assert list(idle_settings(config, [], has_rows=False)) == []


def test_a_choice_of_experts_is_noted_where_the_model_has_none(tmp_path: Path) -> None:
    changes = {"lora.experts": "none", "training.max_steps": 1, "output_dir": str(tmp_path / "run")}
    assert "lora.experts is not used: the model has no routed experts" in train(merged(SMALL, changes)).notes


@pytest.mark.fault("U01")
def test_what_is_no_path_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QH-U01.*data is a value of type list; a path was expected"):
        resume(tmp_path, data=[{"text": "a"}])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"QH-U01.*data is a value of type list; a path was expected"):
        resume(tmp_path, data=[])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"QH-U01.*model is a value of type int; a path was expected"):
        resume(tmp_path, model=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"QH-U01.*run_dir is a value of type int"):
        resume(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"QH-U01.*a settings file, a mapping or a RunConfig is expected, not .* int"):
        train(5)  # type: ignore[arg-type]
