"""Where the merged model goes: checked before any work, built beside its place, and put there by one rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_hal import durable_files
from qlora_hal.errors import StorageError
from qlora_hal.output_path import writable_folder
from qlora_hal.report import figures

_STAGING = ".merging-"


def check_free(out: Path) -> list[str]:
    """Notes on what interrupted merges left beside `out`. Raises StorageError: QH-C60 when `out` is taken, QH-S12 or
    QH-S14 when nothing can be written there."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise StorageError(
            "QH-C60",
            f"{out} is there already; a new folder is expected.",
            where=str(out),
            cause="A merged model never replaces another, or mixes with other files.",
            fix="Name another folder, or remove this one.",
        )
    parent = writable_folder(out.absolute().parent)
    left = sorted(path for path in parent.glob(f"{_STAGING}{out.name}-*") if path.is_dir())
    return [
        f"an interrupted merge left {path} ({figures.size(durable_files.tree_bytes(path))}); remove it" for path in left
    ]


def check_space(out: Path, needed: int, *, candidates: int) -> None:
    """Raises StorageError QH-S09 when `needed` bytes are not free where `out` will be."""
    free = durable_files.free_bytes(out.absolute().parent)
    if free is None or free >= needed:
        return
    raise StorageError(
        "QH-S09",
        f"The merge needs {needed} bytes ({figures.size(needed)}); {free} ({figures.size(free)}) are free at "
        f"{out.absolute().parent}.",
        where=str(out),
        cause="Both candidates for the base are written before the better one is kept." if candidates > 1 else "",
        fix="Free space, or name the base yourself (--base dequantized), which needs about half."
        if candidates > 1
        else "Free space, or choose a folder on another disk.",
        context={"needed_bytes": needed, "free_bytes": free},
    )


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone at the end whatever happens. OSError inside becomes StorageError QH-S09 or QH-S11."""
    folder = out.absolute().parent / f"{_STAGING}{out.name}-{durable_files.unique_name()}"
    try:
        folder.mkdir()
        yield folder
    except OSError as problem:
        raise durable_files.storage_error(problem, out, what="the merged model") from problem
    finally:
        with suppress(OSError):
            durable_files.remove_tree(folder)


def put_in_place(folder: Path, out: Path) -> None:
    """Give a finished folder its name. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as stream:
                durable_files.flush_to_medium(stream.fileno())
    durable_files.flush_folder(folder)
    if out.is_dir():
        out.rmdir()  # empty, or it fails
    folder.rename(out)
    durable_files.flush_folder(out.absolute().parent)
