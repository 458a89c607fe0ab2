"""Links and other files that were put where a run writes or reads: refused by name, and what they point to stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.checkpoint import latest_valid_checkpoint, load_checkpoint, save_checkpoint
from qlora_hal.data.source.in_memory import kept_rows
from qlora_hal.errors import CheckpointError, QloraHalError, StorageError, UnsafeInputError
from qlora_hal.report.html import write_report
from qlora_hal.report.metrics import MetricsFile
from qlora_hal.run.directory import RunDirectory, rehearsed
from qlora_hal.run.lock import RunLock
from qlora_hal.run.trained_base import finished_adapter
from tests.checkpoint.small_states import assert_same_state, small_state

CONFIG: dict[str, Any] = {"output_dir": "x", "lora": {"r": 8}}
FILES = ("run.json", "run.lock", "run.lock.json", "metrics.jsonl", "rows.jsonl", "report.html", "loss.svg")
FOLDERS = ("checkpoints", "adapter", "best_adapter", "tokens", "tensorboard")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    RunDirectory.open_new(folder, config=CONFIG).close()
    save_checkpoint(folder, small_state(1), keep=2)
    return folder


def planted(run_dir: Path, name: str) -> Path:
    """A link under this name to something precious outside; what it points to."""
    outside = run_dir.with_name("outside")
    if name in FILES:
        outside.write_bytes(b"precious")
    else:
        outside.mkdir()
        (outside / "precious").write_bytes(b"precious")
    place = run_dir / name
    if place.exists():
        place.rename(run_dir.with_name("before"))
    place.symlink_to(outside)
    return outside


def content(outside: Path) -> list[tuple[str, bytes]]:
    files = [outside] if outside.is_file() else sorted(outside.rglob("*"))
    return [(file.name, file.read_bytes()) for file in files]


@pytest.mark.fault("X06")
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_link_under_a_name_that_a_run_uses_is_refused_and_not_followed(run_dir: Path, name: str) -> None:
    outside = planted(run_dir, name)
    before = content(outside)

    def rehearse() -> None:
        with rehearsed(run_dir, config=CONFIG):
            pass

    for opening in (
        lambda: RunDirectory.open_existing(run_dir),
        lambda: RunDirectory.open_new(run_dir, config=CONFIG, overwrite=True),
        rehearse,
    ):
        with pytest.raises(UnsafeInputError, match=f"{name} is a symbolic link to ") as refused:
            opening()
        assert (refused.value.code, refused.value.exit_status) == ("QH-X06", 10)
        assert "Remove the link" in refused.value.fix
    assert (run_dir / name).is_symlink()
    assert content(outside) == before


@pytest.mark.fault("X06")
@pytest.mark.parametrize("kind", ["pipe", "file", "folder"])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_is_of_another_kind_than_a_run_has_is_refused_by_name(run_dir: Path, name: str, kind: str) -> None:
    """A pipe would be waited for, and a folder in the place of a log was told as a defect of ours."""
    if kind == ("file" if name in FILES else "folder"):
        return
    place = run_dir / name
    if place.exists():
        place.rename(run_dir.with_name("before"))
    {"pipe": os.mkfifo, "file": Path.touch, "folder": Path.mkdir}[kind](place)
    for opening in (
        lambda: RunDirectory.open_existing(run_dir),
        lambda: RunDirectory.open_new(run_dir, config=CONFIG, overwrite=True),
    ):
        with pytest.raises(UnsafeInputError, match=f"{name} is not a (regular file|folder)") as refused:
            opening()
        assert (refused.value.code, refused.value.exit_status) == ("QH-X06", 10)


@pytest.mark.fault("X06")
@pytest.mark.parametrize("target", ["nowhere", ".", "run.json"])
def test_a_link_to_nothing_or_back_into_the_folder_is_refused_too(run_dir: Path, target: str) -> None:
    (run_dir / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        RunDirectory.open_existing(run_dir)
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        MetricsFile(run_dir / "metrics.jsonl")
    assert not (run_dir / "nowhere").exists()


@pytest.mark.fault("X06")
def test_each_reader_and_writer_refuses_a_link_by_itself(run_dir: Path, tmp_path: Path) -> None:
    """Planted while a run lives, or met by a command that opens no run."""
    outside = tmp_path / "precious"
    outside.write_bytes(b'{"step": 1}\n')
    for name in ("metrics.jsonl", "rows.jsonl", "run.lock.new"):
        (run_dir / name).symlink_to(outside)
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        MetricsFile(run_dir / "metrics.jsonl")
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        kept_rows(run_dir)
    (run_dir / "run.lock").unlink()
    (run_dir / "run.lock").symlink_to(outside)
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        RunLock.take(run_dir)
    (run_dir / "adapter").symlink_to(tmp_path)
    with pytest.raises(UnsafeInputError, match="QH-X06"):
        finished_adapter(run_dir)
    (run_dir / "run.json").rename(tmp_path / "run.json")
    (run_dir / "run.json").symlink_to(tmp_path / "run.json")
    with pytest.raises(QloraHalError, match="QH-X06"):
        write_report(run_dir)
    assert outside.read_bytes() == b'{"step": 1}\n'


@pytest.mark.fault("X06")
def test_links_inside_a_checkpoint_make_it_broken(run_dir: Path, tmp_path: Path) -> None:
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    for name in ("optimizer.safetensors", "adapter_model.safetensors", "trainer_state.json", "MANIFEST.json"):
        moved = tmp_path / name
        (newest / name).rename(moved)
        (newest / name).symlink_to(moved)  # the very bytes, but who knows for how long
        assert latest_valid_checkpoint(run_dir, set_aside_broken=False)[0].name == "step-00000001"
        (newest / name).unlink()
        moved.rename(newest / name)
    assert_same_state(load_checkpoint(newest), small_state(2))


def test_the_link_for_people_may_point_anywhere_and_is_never_read(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "latest").unlink()
    (run_dir / "latest").symlink_to(tmp_path)
    with RunDirectory.open_existing(run_dir):
        save_checkpoint(run_dir, small_state(2), keep=2)
    assert os.readlink(run_dir / "latest") == "checkpoints/step-00000002"


@pytest.mark.fault("X06")
def test_a_lock_that_is_a_second_name_of_another_file_is_refused_and_that_file_stays(
    run_dir: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (run_dir / "run.lock").unlink()
    os.link(precious, run_dir / "run.lock")
    with pytest.raises(UnsafeInputError, match="a second name of another file") as refused:
        RunDirectory.open_existing(run_dir)
    assert refused.value.code == "QH-X06"
    assert precious.read_bytes() == b"precious"
    (run_dir / "run.lock").unlink()
    os.mkfifo(run_dir / "run.lock")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        RunDirectory.open_existing(run_dir)


def test_a_copy_made_of_hard_links_goes_on_by_itself(tmp_path: Path) -> None:
    """As `cp -al` makes one: the other name keeps what it had."""
    original, copy = tmp_path / "original.jsonl", tmp_path / "copy.jsonl"
    original.write_bytes(b'{"step": 1}\n')
    os.link(original, copy)
    with MetricsFile(copy) as metrics:
        assert metrics.notes == ()
        metrics.append({"step": 2})
    assert original.read_bytes() == b'{"step": 1}\n'
    assert copy.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    RunLock.take(tmp_path / "a").release()
    os.link(tmp_path / "a" / "run.lock", tmp_path / "b" / "run.lock")
    RunLock.take(tmp_path / "b").release()


def test_a_pipe_in_place_of_the_log_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(StorageError, match="not a regular file"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_a_checkpoint_that_is_a_link_is_passed_over_by_name(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(2), keep=2)
    newest = run_dir / "checkpoints" / "step-00000002"
    newest.rename(run_dir.with_name("moved"))
    newest.symlink_to(run_dir.with_name("moved"))
    path, notes = latest_valid_checkpoint(run_dir)
    assert path.name == "step-00000001"
    assert any("step-00000002: it is a link" in note for note in notes)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="step-00000002: it is a link"):
        latest_valid_checkpoint(run_dir)
