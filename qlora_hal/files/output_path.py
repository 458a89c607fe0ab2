"""Whether a path can hold a run's output, found out before anything heavy is loaded."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from qlora_hal.errors import StorageError
from qlora_hal.files import durable
from qlora_hal.files.refused_paths import expanded, half_of_a_character


def refuse_no_path(path: Path) -> None:
    """Raise StorageError (QH-S14) for what no file system has a name for, and for what is no UTF-8: a run writes its
    paths down."""
    if "\0" in str(path):
        _refuse_path(path, "holds a NUL character")
    if (half := half_of_a_character(str(path))) is not None:
        _refuse_path(path, f"holds {half} and is not UTF-8")


def writable_folder(path: Path) -> Path:
    """The folder itself, created if needed and proved writable by writing; links on the way are resolved once.

    Raises StorageError: QH-S14 (a file, a loop, a link to nothing), QH-S12 (cannot be written), QH-S09 (no space).
    """
    refuse_no_path(path)
    path = expanded(path)
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_dir():
            _refuse_path(path, "is a file")
    except FileNotFoundError:
        dangling = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)
        if dangling is not None:
            _refuse_path(path, f"goes through {dangling}, a link to {os.readlink(dangling)}, which does not exist")
        real = Path(os.path.realpath(path))
    except NotADirectoryError as problem:
        _refuse_path(path, "goes through a file", problem)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            _refuse_path(path, "is a loop of symbolic links", problem)
        _refuse_unwritable(path, problem)
    refuse_no_path(real)
    try:
        real.mkdir(parents=True, exist_ok=True)
        probe = real / f".tmp-probe-{durable.unique_name()}"
        try:
            durable.write_new(probe, [b"0" * 512])
        finally:
            with suppress(OSError):
                probe.unlink()
        with suppress(OSError):  # a parent that may be entered but not listed cannot be flushed
            durable.flush_folder(real.parent)
    except OSError as problem:
        _refuse_unwritable(real, problem)
    return real


def _refuse_path(path: Path, problem: str, cause: BaseException | None = None) -> NoReturn:
    raise StorageError(
        "QH-S14",
        f"The output path {ascii(str(path))[1:-1]} {problem}; a folder, or a name for a new one, is expected.",
        where="output_dir",
        fix="Choose another output_dir.",
    ) from cause


def _refuse_unwritable(path: Path, problem: OSError) -> NoReturn:
    error = durable.storage_error(problem, path, what="the output folder")
    if error.code == "QH-S11":
        # Before a run, any other failure (no such device, an unwritable pseudo file system) is a wrong place as well.
        error.code = "QH-S12"
        error.fix = "Choose an output_dir on a disk where this user may write."
    elif error.code == "QH-S09":
        error.fix = "Free space, raise the quota, or choose an output_dir on another disk."
    raise error from problem


def write_whole(file: Path, text: str) -> None:
    """Write a new file, or leave none. Raises OSError, FileExistsError among them."""
    with file.open("x", encoding="utf-8") as stream:
        try:
            stream.write(text)
            stream.flush()
        except BaseException:
            with suppress(OSError):
                stream.close()
            file.unlink(missing_ok=True)
            raise
