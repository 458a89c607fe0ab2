"""A checkpoint keeps the id and the record of its run; a resume compares them, and no other run's is removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.checkpoint import load_checkpoint, save_checkpoint
from qlora_hal.checkpoint.reading import kept_record
from qlora_hal.errors import CheckpointError, ConfigError
from qlora_hal.files.sealed_json import sealed, unsealed
from qlora_hal.run.directory import RunDirectory
from qlora_hal.run.identity import config_hash, identity_of, require_own, settings_hash
from tests.checkpoint.small_states import small_state

CONFIG: dict[str, Any] = {
    "output_dir": "runs/a",
    "model": {"name_or_path": "/models/base"},
    "data": {"path": "/data/rows.jsonl", "validation_path": None, "shuffle": True},
    "training": {"learning_rate": 2e-4, "max_steps": 9, "lr_scheduler_type": "linear", "seed": None},
}


def changed(path: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(CONFIG))
    group, _, name = path.rpartition(".")
    (tree[group] if group else tree)[name] = value
    return tree


def begun(folder: Path, config: Mapping[str, object] = CONFIG, *, seed: int = 5) -> Mapping[str, object]:
    """What run.json of a run holds that has drawn its seed."""
    with RunDirectory.open_new(folder, config=config) as run:
        run.record({"resolved": {"seed": seed}})
        return run.content


def saved(folder: Path, content: Mapping[str, object], step: int = 3, *, seed: int = 5) -> Path:
    state = small_state(step)
    provenance = {**state.provenance, "seed": seed, **identity_of(content)}
    return save_checkpoint(folder, replace(state, provenance=provenance), keep=2, record=content)


def judged(content: Mapping[str, object], checkpoint: Path) -> list[str]:
    return require_own(content, load_checkpoint(checkpoint), kept_record(checkpoint), checkpoint)


def test_a_runs_own_checkpoint_is_taken_without_a_word(tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    checkpoint = saved(tmp_path / "run", content)
    assert judged(content, checkpoint) == []
    assert kept_record(checkpoint) == content


@pytest.mark.fault("C20")
@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("training.learning_rate", 1e-4),
        ("training.max_steps", 10),
        ("training.lr_scheduler_type", "cosine"),
        ("data.shuffle", False),
        ("training.seed", 6),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_both_values(path: str, there: object, tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    foreign = saved(tmp_path / "other", begun(tmp_path / "other", changed(path, there)))
    with pytest.raises(CheckpointError, match=f"{path} ") as refused:
        judged(content, foreign)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C20", 9)
    assert "belongs to another run" in refused.value.message
    assert f"there {there!r}" in refused.value.message
    assert path in refused.value.context["differing"]  # type: ignore[operator]


@pytest.mark.fault("C20")
def test_a_checkpoint_of_another_drawn_seed_is_refused(tmp_path: Path) -> None:
    content = begun(tmp_path / "run", seed=5)
    other = begun(tmp_path / "other", seed=6)
    with pytest.raises(CheckpointError, match=r"training\.seed \(there 6, here 5\)"):
        judged(content, saved(tmp_path / "other", other, seed=6))


@pytest.mark.fault("C20")
def test_a_checkpoint_of_another_run_with_these_settings_is_refused(tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run: one that began at another time, with these settings"):
        judged(content, saved(tmp_path / "other", begun(tmp_path / "other")))


@pytest.mark.fault("C20")
def test_a_checkpoint_without_an_id_does_not_pass_for_that_of_a_run_with_one(tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run"):
        judged(content, save_checkpoint(tmp_path / "run", small_state(3), keep=2))


@pytest.mark.parametrize("path", ["output_dir", "model.name_or_path", "data.path", "data.validation_path"])
def test_places_may_change_while_a_run_lives(path: str, tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    checkpoint = saved(tmp_path / "run", content)
    moved = changed(path, "/elsewhere")
    assert settings_hash(moved) == settings_hash(CONFIG)
    assert judged({**content, "config": moved, "config_hash": config_hash(moved)}, checkpoint) == []


def test_a_move_changes_the_places_in_the_record_and_nothing_else() -> None:
    """Not even where this release knows settings that the run began without."""
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.run.paths import PathOverrides
    from qlora_hal.run.resumption import with_new_paths

    before = RunRecord(config=CONFIG, origins={})
    moved = RunConfig.model_validate(changed("data.path", "/elsewhere/rows.jsonl"))
    after = with_new_paths(before, PathOverrides(data="/elsewhere/rows.jsonl"), moved)
    assert after.config == changed("data.path", "/elsewhere/rows.jsonl")
    assert settings_hash(after.config) == settings_hash(CONFIG)
    assert before.config == CONFIG


def test_what_an_earlier_release_cannot_show_is_said(tmp_path: Path) -> None:
    content = {key: value for key, value in begun(tmp_path / "run").items() if key != "run_id"}
    state = small_state(3)
    stamped = {**state.provenance, "seed": 5, "config_hash": content["config_hash"]}
    (note,) = require_own(content, replace(state, provenance=stamped), {}, tmp_path)
    assert "earlier release" in note
    assert "its settings, seed, base, tokenizer and data are compared" in note
    (note,) = require_own(content, replace(state, provenance={**stamped, "config_hash": "ab"}), {}, tmp_path)
    assert "and has its settings cannot be verified; its seed, base, tokenizer and data are compared" in note
    with pytest.raises(CheckpointError, match=r"training\.seed \(there 6, here 5\)"):
        require_own(content, replace(state, provenance={**stamped, "seed": 6}), {}, tmp_path)


def test_saving_never_removes_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    other = begun(tmp_path / "other")
    foreign = saved(tmp_path / "run", other, 1)
    before = (foreign / "optimizer.safetensors").read_bytes()
    for step in (2, 3, 4, 5):
        saved(tmp_path / "run", content, step)
    assert sorted(path.name[-1] for path in foreign.parent.iterdir()) == ["1", "4", "5"]
    saved(tmp_path / "run", content, 1)  # even in its place
    (aside,) = foreign.parent.glob(".corrupt-step-00000001-*")
    assert (aside / "optimizer.safetensors").read_bytes() == before


@pytest.mark.fault("C04")
def test_an_adapter_and_an_optimizer_of_two_runs_do_not_pass_as_one(tmp_path: Path) -> None:
    """Even where the manifest was made to fit."""
    from qlora_hal.checkpoint.manifest import encode_manifest, file_sha256, read_manifest
    from qlora_hal.files.durable import WrittenFile

    checkpoint = saved(tmp_path / "run", begun(tmp_path / "run"))
    foreign = saved(tmp_path / "other", begun(tmp_path / "other"))
    manifest = read_manifest(checkpoint)
    for name in ("adapter_model.safetensors", "qlora_hal.json"):
        (checkpoint / name).write_bytes((foreign / name).read_bytes())
    files = {
        name: WrittenFile((checkpoint / name).stat().st_size, file_sha256(checkpoint / name)) for name in manifest.files
    }
    (checkpoint / "MANIFEST.json").write_bytes(encode_manifest(manifest.step, files, manifest.summary))
    with pytest.raises(CheckpointError, match="its adapter and its optimizer belong to different runs"):
        load_checkpoint(checkpoint)


# run.json, lost and written again ------------------------------------------------------------------------------------
DAMAGES = {
    "missing": None,
    "empty": b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "zeros": lambda raw: bytes(len(raw)),
    "zero tail": lambda raw: raw[:-40] + bytes(40),
    "a flipped bit": lambda raw: raw.replace(b'"created": "2', b'"created": "3'),
    "a number edited": lambda raw: raw.replace(b'"seed": 5', b'"seed": 6'),
    "the hash edited": lambda raw: raw.replace(b'"content_sha256": "', b'"content_sha256": "0')[:],
    "the hash removed": lambda raw: json.dumps(unsealed(json.loads(raw))).encode(),
    "a list": b"[]",
}


@pytest.mark.fault("S50")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_or_damaged_run_json_is_written_again_from_the_newest_checkpoint(damage: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    content = begun(run_dir)
    saved(run_dir, content, 2)
    saved(run_dir, content, 3)
    file, change = run_dir / "run.json", DAMAGES[damage]
    raw = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change if isinstance(change, bytes) else change(raw))
        assert file.read_bytes() != raw
    with RunDirectory.open_existing(run_dir) as run:
        assert run.content == content
        (note,) = run.notes
    assert "run.json was written again from the copy in step-00000003, because it" in note
    assert file.read_bytes() == raw
    kept = list(run_dir.glob(".damaged-run.json-*"))
    assert len(kept) == (0 if damage == "missing" else 1)
    with RunDirectory.open_existing(run_dir) as run:
        assert run.notes == []


@pytest.mark.fault("C20")
def test_a_lost_run_json_is_not_written_again_where_checkpoints_of_two_runs_lie(tmp_path: Path) -> None:
    content = begun(tmp_path / "run")
    saved(tmp_path / "run", content, 2)
    saved(tmp_path / "run", begun(tmp_path / "other"), 3)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(CheckpointError, match="belong to several runs: step-00000003 of ") as refused:
        RunDirectory.open_existing(tmp_path / "run")
    assert refused.value.code == "QH-C20"
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.fault("C20")
def test_the_run_json_of_another_run_is_told_by_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "run", begun(tmp_path / "run"))
    other = begun(tmp_path / "other", changed("training.max_steps", 12))
    with pytest.raises(CheckpointError, match=r"training\.max_steps \(there 9, here 12\)") as refused:
        judged(other, checkpoint)
    assert "If it is run.json that came from elsewhere, remove that" in refused.value.fix


@pytest.mark.fault("S50")
def test_a_damaged_checkpoint_is_not_what_run_json_is_written_from(tmp_path: Path) -> None:
    content = begun(tmp_path)
    saved(tmp_path, content, 2)
    newest = saved(tmp_path, content, 3)
    (newest / "run_record.json").write_bytes((newest / "run_record.json").read_bytes().replace(b"/models", b"/model5"))
    (tmp_path / "run.json").unlink()
    with RunDirectory.open_existing(tmp_path) as run:
        assert run.content == content
        assert "step-00000002" in run.notes[0]


@pytest.mark.fault("S50")
def test_without_a_copy_a_damaged_run_json_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    begun(tmp_path)
    save_checkpoint(tmp_path, small_state(3), keep=2)  # as earlier releases did
    (tmp_path / "run.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"it is damaged") as refused:
        RunDirectory.open_existing(tmp_path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S50", 2)
    assert refused.value.cause == "No checkpoint there keeps an intact copy of it."
    assert (tmp_path / "run.json").read_bytes() == b"{"


@pytest.mark.fault("C13")
def test_a_run_json_of_a_newer_release_is_refused_by_its_version(tmp_path: Path) -> None:
    content = begun(tmp_path)
    saved(tmp_path, content, 3)
    (tmp_path / "run.json").write_text(json.dumps(sealed({**content, "schema_version": 2})))
    with pytest.raises(CheckpointError, match="schema version 2, this version of qlora_hal reads 1") as refused:
        RunDirectory.open_existing(tmp_path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C13", 9)


@pytest.mark.parametrize(("name", "value"), [("notes", 7), ("timings", []), ("status", None), ("steps", "4")])
def test_values_of_a_wrong_type_in_an_unsealed_run_json_are_refused_by_name(
    name: str, value: object, tmp_path: Path
) -> None:
    content = {key: item for key, item in unsealed(begun(tmp_path)).items() if key != "run_id"}
    (tmp_path / "run.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ConfigError, match=f"QH-S50.*wrong type under {name}"):
        RunDirectory.open_existing(tmp_path)


def test_another_layout_of_the_same_content_is_no_damage(tmp_path: Path) -> None:
    content = begun(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(content))
    with RunDirectory.open_existing(tmp_path) as run:
        assert run.notes == []
        assert run.content == content
