"""A folder that is whole or absent: built beside its place, and put there by one rename."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from qlora_hal.errors import figures
from qlora_hal.files import durable
from qlora_hal.files.refused_paths import refuse_other_encodings


@contextmanager
def staging(out: Path, *, prefix: str, what: str) -> Iterator[Path]:
    """A folder beside `out`, gone at the end whatever happens. OSError inside becomes StorageError QH-S09, QH-S11 or
    QH-S12, told as a failure to write `what`. Raises ConfigError QH-U30 for a path that is not UTF-8."""
    refuse_other_encodings(str(out.absolute()))
    folder = out.absolute().parent / f"{prefix}{out.name}-{durable.unique_name()}"
    try:
        folder.mkdir()
        yield folder
    except OSError as problem:
        raise durable.storage_error(problem, out, what=what) from problem
    finally:
        with suppress(OSError):
            durable.remove_tree(folder)


def left_behind(out: Path, *, prefix: str, what: str) -> list[str]:
    """Notes on what interrupted attempts left beside `out`."""
    left = sorted(path for path in out.absolute().parent.glob(f"{prefix}{escape(out.name)}-*") if path.is_dir())
    return [f"{what} left {path} ({figures.size(durable.tree_bytes(path))}); remove it" for path in left]


def put_in_place(folder: Path, out: Path) -> None:
    """Flush a finished folder and give it its name. Raises OSError."""
    durable.flush_tree(folder)
    if out.is_dir():
        out.rmdir()  # empty, or it fails
    folder.rename(out)
    durable.flush_folder(out.absolute().parent)
