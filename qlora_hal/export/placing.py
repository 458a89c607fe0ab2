"""Where the merged model goes, checked before any work."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from qlora_hal.errors import StorageError, figures
from qlora_hal.files import atomic_folder, durable
from qlora_hal.files.output_path import writable_folder

_STAGING = ".merging-"


def check_free(out: Path) -> list[str]:
    """Notes on what interrupted merges left beside `out`. Raises StorageError: QH-C60 when `out` is taken, QH-S12 or
    QH-S14 when nothing can be written there."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise StorageError(
            "QH-C60",
            f"{out} already exists; a new folder is expected.",
            where=str(out),
            cause="A merged model never replaces another, or mixes with other files.",
            fix="Name another folder, or remove this one.",
        )
    writable_folder(out.absolute().parent)
    return atomic_folder.left_behind(out, prefix=_STAGING, what="an interrupted merge")


def check_space(out: Path, needed: int, *, candidates: int) -> None:
    """Raises StorageError QH-S09 when `needed` bytes are not free where `out` will be."""
    free = durable.free_bytes(out.absolute().parent)
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


def staging(out: Path) -> AbstractContextManager[Path]:
    """A folder beside `out`, gone at the end whatever happens. OSError inside becomes StorageError QH-S09 or QH-S11."""
    return atomic_folder.staging(out, prefix=_STAGING, what="the merged model")
