"""Files that are either whole or absent after a crash, and readers that no planted link leads astray.

A file counts as durable when its bytes and its directory entry were both flushed: fsync of the file, then fsync of the
folder (POSIX fsync(2); on macOS only F_FULLFSYNC reaches the medium).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.errors import StorageError
from qlora_hal.files import strict_json
from qlora_hal.files.opening import _BINARY, _NO_FOLLOW, open_regular

_CHUNK_BYTES = 1 << 20

DAMAGED = ".damaged-"
"""Begins the name of what was found damaged and set aside; the sweep of leftovers keeps it."""

Chunk = bytes | memoryview


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size and SHA-256 of the bytes that were meant to be written."""

    size: int
    sha256: str


def write_new(path: Path, chunks: Iterable[Chunk], *, midway: Callable[[Path], None] | None = None) -> WrittenFile:
    """Write a file that does not exist yet and flush it; its mode follows the umask.

    `midway` is called once, when the first chunk has reached the operating system (to inject faults). Raises OSError.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o666)
    with open(descriptor, "wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if midway is not None:
                stream.flush()
                midway(path)
                midway = None
        stream.flush()
        flush_to_medium(stream.fileno())
    return WrittenFile(size, digest.hexdigest())


def write_json_atomically(path: Path, value: object) -> None:
    """Replace a JSON file as one act: a reader or a crash sees the old or the new one. Raises OSError, JsonProblem."""
    raw = strict_json.encode(value)
    temporary = path.with_name(f".tmp-{path.name}-{unique_name()}")
    try:
        write_new(temporary, [raw])
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    flush_folder(path.parent)


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that its name is free and nothing of it is lost; the new path. Raises OSError."""
    aside = path.with_name(f"{DAMAGED}{path.name}-{unique_name()}")
    path.rename(aside)
    flush_folder(path.parent)
    return aside


def hashed(path: Path) -> WrittenFile:
    """Size and SHA-256 of an ordinary file as it is now, read once. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return WrittenFile(size, digest.hexdigest())


def flush_to_medium(descriptor: int) -> None:
    """fsync, in the form that reaches the medium on this system."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # network volumes refuse F_FULLFSYNC; plain fsync is all they have
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Make the entries of a folder durable. Windows has no such call and needs none for a rename."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_to_medium(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Make all files below a folder durable, and the entries of every folder. Raises OSError."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            # Windows flushes only what is open for writing.
            with open(os.path.join(parent, name), "rb+" if sys.platform == "win32" else "rb") as stream:
                flush_to_medium(stream.fileno())
        flush_folder(Path(parent))


def remove_tree(path: Path) -> int:
    """Delete a file, a link or a folder, following no link; returns the bytes that its ordinary files held."""
    if path.is_symlink() or not path.is_dir():
        size = 0 if path.is_symlink() else path.stat().st_size
        path.unlink()
        return size
    size = tree_bytes(path)
    shutil.rmtree(path)
    return size


def tree_bytes(folder: Path) -> int:
    """Bytes in the ordinary files below a folder; links count nothing and are not followed."""
    total = 0
    for parent, _, names in os.walk(folder, followlinks=False):
        for name in names:
            with suppress(OSError):
                facts = os.lstat(os.path.join(parent, name))
                total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return total


_NO_SPACE = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


_AGAIN = {
    True: "resume",
    False: "start again",
    None: "run the command again; a run that has saved a step is resumed",
}


def storage_error(
    problem: OSError,
    place: Path,
    *,
    what: str,
    needed_bytes: int | None = None,
    safe: str = "",
    resumable: bool | None = None,
) -> StorageError:
    """The error for a write that failed: QH-S09 (no space), QH-S12 (no permission) or QH-S11 (anything else).

    `what` was being written to `place`; `safe` says which earlier state is untouched, and
    `resumable` whether a run goes on from it; None where that is not known.
    """
    again = _AGAIN[resumable]
    name = errno.errorcode.get(problem.errno or 0, type(problem).__name__)
    free = free_bytes(place)
    context: dict[str, object] = {"errno": name, "needed_bytes": needed_bytes, "free_bytes": free}
    if problem.errno in _NO_SPACE:
        needs = f"needs {needed_bytes} bytes, " if needed_bytes is not None else ""
        room = f"{needs}{free if free is not None else 'unknown'} free at {place}"
        full, way_out = _what_is_full(problem, place, needed_bytes, free)
        message = f"{full} while writing {what}: {room}."
        code, fix = "QH-S09", f"{way_out}, then {again}."
    elif problem.errno in _NO_PERMISSION:
        message = f"No permission to write {what} at {place}."
        code, fix = "QH-S12", "Choose a folder that this user may write to."
    else:
        message = f"{what[0].upper()}{what[1:]} could not be written at {place}."
        code, fix = "QH-S11", f"Check the disk or the network mount, then {again}."
    cause = f"{name}: {problem.strerror or problem}"
    message = f"{message} {safe}".rstrip()
    return StorageError(code, message, where=str(place), cause=cause, fix=fix, context=context)


def _what_is_full(problem: OSError, place: Path, needed: int | None, free: int | None) -> tuple[str, str]:
    """One error number stands for several limits: which of them it is, and the way out."""
    if problem.errno == errno.EFBIG:
        return "File size limit reached", "Raise the limit (ulimit -f)"
    if problem.errno == getattr(errno, "EDQUOT", None):
        return "Quota used up", "Remove your files there, or have the quota raised"
    if free_files(place) == 0:
        return (
            "No room for another file (the file system is out of inodes, though it has free bytes)",
            "Remove files there; small ones count as much as large ones",
        )
    if free is not None and free > max(needed or 0, _SURELY_ROOM):
        return (
            "Disk full",
            "Free space; if many bytes are free, a quota or the file system's own tables are full",
        )
    return "Disk full", "Free space, or raise the quota or file size limit"


_SURELY_ROOM = 64 * 1024 * 1024
"""Bytes. Less may be kept back for the system's own use."""


def free_files(place: Path) -> int | None:
    """How many more files this user may make where `place` is or would be; None when the file system sets no limit, or
    none can be known."""
    if not hasattr(os, "statvfs"):
        return None
    for folder in (place, *place.parents):
        with suppress(OSError):
            facts = os.statvfs(folder)
            return facts.f_favail if facts.f_files else None
    return None


def free_bytes(place: Path) -> int | None:
    """Bytes that this user may still write where `place` is or would be; None when that cannot be known."""
    for folder in (place, *place.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def unique_name() -> str:
    """Eight hexadecimal digits for names of temporary entries."""
    return uuid.uuid4().hex[:8]
