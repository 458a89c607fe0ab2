"""Files opened without being led astray: no link is followed, and nothing but an ordinary file is read."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from qlora_hal.errors import UnsafeInputError

# Windows knows neither; a missing flag is 0 there.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> io.BufferedReader:
    """Open an ordinary file for reading. A symbolic link, pipe or device raises OSError instead of being followed."""
    descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_stored(path: Path, most_bytes: int) -> bytes:
    """The bytes of an ordinary file, `most_bytes` + 1 of them where it has more. It may be a link, as the files of a
    hub snapshot are, but lead to no pipe and no device (OSError)."""
    with open_regular(stored_path(path)) as stream:
        return stream.read(most_bytes + 1)


def stored_path(path: Path) -> Path:
    """Where the links of a path lead. Raises OSError where that is nowhere, or where they go round in a circle."""
    return Path(os.path.realpath(path, strict=True))


def open_appending(path: Path) -> io.BufferedWriter:
    """Open an ordinary file for appending, or create it. A symbolic link, pipe or device raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | _NO_WAIT | _BINARY, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "ab")
    except BaseException:
        os.close(descriptor)
        raise


def kind_there(path: Path) -> str:
    """What stands under a name, in words; nothing where nothing does."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing there, or what is there leads nowhere
        return "a link to nothing" if os.path.islink(path) else "what cannot be read" if os.path.lexists(path) else ""
    kinds = ((stat.S_ISREG, "a regular file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device or socket")


def refuse_other_kind(path: Path, expected: str) -> None:
    """`expected` is a word of `kind_there`; absent is as good. Raises UnsafeInputError QH-X06, for a link too."""
    refuse_link(path)
    if (found := kind_there(path)) not in ("", expected):
        raise UnsafeInputError(
            "QH-X06",
            f"{path} is not {expected}, as a run has there, but {found}.",
            where=str(path),
            cause="No run put it there, and it cannot be read or replaced as its own.",
            fix="Move it elsewhere.",
        )


def refuse_link(path: Path) -> None:
    """Nothing of ours is written or read through a link. Raises UnsafeInputError QH-X06 when `path` is one."""
    if not os.path.islink(path):
        return
    raise UnsafeInputError(
        "QH-X06",
        f"{path} is a symbolic link to {ascii(os.readlink(path))[1:-1]}; what a run writes and reads there must be in "
        "the folder itself.",
        where=str(path),
        cause="Writing through it would change a file elsewhere, and reading would trust one.",
        fix="Remove the link, or put what it points to in its place.",
    )
