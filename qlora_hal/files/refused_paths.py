"""Paths that the operating system refuses before it looks for a file: too long, through a folder that may not be
entered, or from the home of nobody."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_hal.errors import ConfigError

_REFUSALS = frozenset({errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP})
_SHOWN = 120


@contextmanager
def refused_paths_told() -> Iterator[None]:
    """Around what a user calls: whichever question about a path is asked first, its refusal is told as one, and first
    that the working directory is gone, from which relative paths start. Raises ConfigError QH-U30."""
    _refuse_lost_working_directory()
    try:
        yield
    except OSError as problem:
        if problem.filename is None or problem.errno not in _REFUSALS:
            raise
        path = os.fsdecode(problem.filename) if not isinstance(problem.filename, int) else str(problem.filename)
        raise ConfigError(
            "QH-U30",
            f"The path {shortened(path)} cannot be used: {os.strerror(problem.errno)}.",
            where=shortened(path),
            cause=f"It has {len(path)} characters; most systems take 4096, and 255 between two slashes."
            if problem.errno == errno.ENAMETOOLONG
            else "The operating system does not let this user access it.",
            fix="Name another path." if problem.errno == errno.ENAMETOOLONG else "Name another, or get access to it.",
        ) from problem


def require_paths_given(
    needed: Mapping[str, object], optional: Mapping[str, object] | None = None, *, cause: str = ""
) -> None:
    """Refuse an argument that is neither text nor a path, by its name; an optional one may be None. Raises ConfigError
    QH-U01."""
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in (*needed.items(), *given.items()):
        if not isinstance(value, str | Path):
            raise ConfigError(
                "QH-U01",
                f"{name} is a value of type {type(value).__name__}; a path was expected.",
                where=name,
                cause=cause,
                fix=f"{'Omit it, or give' if name in given else 'Give'} it as text or as a pathlib.Path.",
            )


def _refuse_lost_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as problem:
        raise ConfigError(
            "QH-U30",
            "The working directory does not exist any more.",
            cause="It was removed or replaced since the shell or the program went there; relative paths lead nowhere, "
            "and libraries end the process.",
            fix="Change to a directory that exists.",
        ) from problem


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path with `~` written out. Raises ConfigError QH-U30 where that is the home of nobody here."""
    try:
        return Path(name).expanduser()
    except RuntimeError as problem:
        first = Path(name).parts[0]
        raise ConfigError(
            "QH-U30",
            f"The path {shortened(str(name))} cannot be used: this system knows no home folder for {first}.",
            where=shortened(str(name)),
            cause="A leading ~ means the home folder of this user, ~name that of another one.",
            fix=f"Write the folder out, or ./{first} for a folder of that name.",
        ) from problem


def named_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user named, `~` expanded; whether something is there or not. Raises OSError where the operating
    system refuses to say: from Python 3.14 on, `Path.is_dir` and its like answer False there."""
    path = expanded(name)
    # A name with a zero byte is a ValueError, and no path of anything.
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        path.stat()
    return path


def half_of_a_character(text: str) -> str | None:
    """What of a text has no form in UTF-8, in words; None where all has. Python reads a byte that is no UTF-8, in a
    path or an argument, as half of a character (PEP 383)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        number = ord(text[problem.start])
        meant = f" (the byte 0x{number - 0xDC00:02x})" if 0xDC80 <= number <= 0xDCFF else ""
        return f"U+{number:04X}, half of a character{meant},"
    return None


def refuse_other_encodings(path: str) -> None:
    """Raise ConfigError QH-U30 for a path that JSON and the libraries that open it have no text for."""
    if (half := half_of_a_character(path)) is not None:
        raise ConfigError(
            "QH-U30",
            f"The path {shortened(path)} cannot be used: it holds {half} and is not UTF-8.",
            where=shortened(path),
            cause="A run writes its paths down as text, and the libraries that open files take UTF-8 alone.",
            fix="Rename that file or folder, or name one in UTF-8.",
        )


def shortened(path: str) -> str:
    """A path as a message can show it: no control characters, and no more than a line or two."""
    shown = ascii(path)[1:-1]
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 30]}...{shown[-20:]}"
