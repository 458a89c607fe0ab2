"""Temporary folders of processes that were killed are removed by the next one, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from qlora_hal.files.scratch import scratch_folder

PREFIX = "qlora_hal-test-"
HOLD = (
    "import sys, time\nfrom qlora_hal.files.scratch import scratch_folder\n"
    f"with scratch_folder({PREFIX!r}) as folder:\n    print(folder, flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def held_by_another(place: Path) -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    assert folder.parent == place
    made_old(folder)
    return child, folder


def made_old(folder: Path) -> None:
    then = time.time() - 600
    os.utime(folder, (then, then))


def test_a_folder_is_there_while_it_is_used_and_gone_after(place: Path) -> None:
    with scratch_folder(PREFIX) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == place
    assert list(place.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_stays(place: Path) -> None:
    child, left = held_by_another(place)
    with scratch_folder(PREFIX):
        assert left.is_dir(), "its process lives"
    child.kill()
    with child:
        pass
    made_old(left)
    with scratch_folder(PREFIX):
        assert not left.exists()


def test_young_folders_links_and_those_of_other_names_stay(place: Path) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (place / f"{PREFIX}link").symlink_to(elsewhere)
    (place / f"{PREFIX}young").mkdir()
    made_old(elsewhere)
    with scratch_folder(PREFIX):
        assert elsewhere.is_dir()
        assert (place / f"{PREFIX}young").is_dir()
        assert (place / f"{PREFIX}link").is_symlink()
