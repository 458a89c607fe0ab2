"""A temporary folder for a child process, and the removal of those whose process was killed before it could."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

LOCK_FILE = ".alive"
_YOUNGEST = 60.0
"""Seconds. A folder that is younger may not have its lock yet."""


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """An empty folder that is locked while it is used. Folders of the same prefix that nobody holds are removed first.

    A lock and no process id: ids are used again, and mean nothing in another container on the same disk.
    """
    _sweep(Path(tempfile.gettempdir()), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        lock = filelock.FileLock(Path(name) / LOCK_FILE, timeout=0)
        with suppress(OSError, NotImplementedError):  # without locks nothing is swept either
            lock.acquire()
        try:
            yield Path(name)
        finally:
            lock.release()


def _sweep(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        if not _is_old_and_ours(folder):
            continue
        with suppress(OSError, NotImplementedError, filelock.Timeout):
            with filelock.FileLock(folder / LOCK_FILE, timeout=0):
                pass
            shutil.rmtree(folder)


def _is_old_and_ours(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    owner = getattr(os, "getuid", lambda: facts.st_uid)()
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and facts.st_uid == owner
        and time.time() - facts.st_mtime > _YOUNGEST
    )
