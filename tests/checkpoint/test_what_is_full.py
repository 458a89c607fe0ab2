"""No space left can be said of bytes, of inodes, of a quota or of one file's size; the message says which."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_hal.checkpoint import latest_valid_checkpoint, save_checkpoint
from qlora_hal.errors import StorageError
from qlora_hal.files.durable import free_files, storage_error
from qlora_hal.run.directory import RunDirectory
from tests.checkpoint.small_states import small_state


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A file system with many bytes and room for 40 files; needs root."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=40,size=64m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.fault("S09")
def test_a_file_system_without_inodes_is_not_called_a_full_disk(few_files: Path) -> None:
    run = few_files / "run"
    with RunDirectory.open_new(run, config={}):
        save_checkpoint(run, small_state(1), keep=2)
        filled = 0
        while free_files(few_files) != 2:
            (few_files / f"filler-{filled}").touch()
            filled += 1
        with pytest.raises(StorageError, match="No room for another file") as full:
            save_checkpoint(run, small_state(2), keep=2)
    assert (full.value.code, full.value.exit_status) == ("QH-S09", 8)
    assert "out of inodes, though it has free bytes" in full.value.message
    assert "Step 1 is safe." in full.value.message
    assert full.value.fix.startswith("Remove files there")
    (few_files / "filler-0").unlink()
    assert latest_valid_checkpoint(run)[0].name == "step-00000001"


def test_a_run_that_finds_no_inode_at_its_start_is_told_so(few_files: Path) -> None:
    filled = 0
    while free_files(few_files):
        (few_files / f"filler-{filled}").touch()
        filled += 1
    with pytest.raises(StorageError, match="No room for another file"):
        RunDirectory.open_new(few_files / "run", config={})


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "Disk full while writing step 3: needs 10 bytes"),
        (errno.EDQUOT, "Quota used up while writing step 3: needs 10 bytes"),
        (errno.EFBIG, "File size limit reached while writing step 3: needs 10 bytes"),
    ],
)
def test_each_limit_is_called_by_its_name(tmp_path: Path, number: int, said: str) -> None:
    problem = OSError(number, os.strerror(number))
    error = storage_error(problem, tmp_path, what="step 3", needed_bytes=10)
    assert error.message.startswith(said)
    assert error.code == "QH-S09"
    assert error.cause.startswith(errno.errorcode[number])


def test_bytes_that_are_free_and_not_given_point_to_a_quota(tmp_path: Path) -> None:
    error = storage_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path, what="step 3", needed_bytes=10)
    assert "if many bytes are free, a quota" in error.fix or "raise the quota" in error.fix


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_was_no_run_is_not_to_be_resumed(tmp_path: Path, number: int) -> None:
    problem = OSError(number, os.strerror(number))
    assert storage_error(problem, tmp_path, what="step 3", resumable=True).fix.endswith(", then resume.")
    assert storage_error(problem, tmp_path, what="step 3", resumable=False).fix.endswith(", then start again.")
    assert ", then run the command again;" in storage_error(problem, tmp_path, what="the adapter").fix
