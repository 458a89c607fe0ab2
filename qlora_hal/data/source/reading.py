"""From what the user named to a stream of rows, each with its file and line.

Memory stays bounded: one line (or one array element, one Parquet batch) at a time, and a row has an upper size. A row
that cannot be read is yielded as the error itself, so that `data.on_bad_row` is decided in one place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from qlora_hal.data.source import hub_rows
from qlora_hal.data.source.row_files import KINDS, rows_in, separator_note
from qlora_hal.data.source.rows import Row, Source, digest_of_files
from qlora_hal.data.source.split_files import files_of_split, listed, split_names
from qlora_hal.errors import DataError, QloraHalError
from qlora_hal.files.opening import kind_there
from qlora_hal.files.refused_paths import named_path

RUN_MARKS = ("run.json", "run.lock")
"""What the output folder of a run holds from its start. Its records end in .json and .jsonl, and are no rows."""


def open_source(path: str, split: str = "train", max_rows: int | None = None) -> Source:
    """The source behind a file, a folder, or a Hugging Face dataset id; of what has splits, the rows of `split`. Of a
    hub dataset no more than `max_rows` are fetched; the caller reads no more of others.

    Raises DataError (QH-D50 nothing there or no such split, QH-D51 kind of file or missing library) and HubError
    (QH-E11, QH-D17).
    """
    here = named_path(path)
    if here.is_file():
        return _files_source(path, [here])
    if hub_rows.is_saved_dataset(here):
        return hub_rows.saved_source(here, split)
    if here.is_dir():
        return _folder_source(path, here, split)
    refuse_absent(path)
    return hub_rows.hub_source(path, split, max_rows)


def refuse_absent(path: str) -> None:
    """What names alone tell: nothing is there and the name is no dataset id, or the file is of a kind that is not read.
    Raises DataError (QH-D50, QH-D51)."""
    here = named_path(path)
    if here.is_file():
        _refuse_other_kinds([here])
    _refuse_unreadable(here)
    if here.exists() or (hub_rows.could_be_id(path) and not _is_named_like_a_file(here)):
        return
    near = get_close_matches(here.name, _names_in(here.parent), n=1)
    raise DataError(
        "QH-D50",
        f"There is no file, folder or dataset {path!r}{f'; did you mean {here.with_name(near[0])}?' if near else '.'}",
        where="data.path",
        cause="The name is neither a path on this disk nor a dataset id of the form owner/name.",
        fix="Give data.path the path of a JSONL, JSON, CSV or Parquet file.",
    )


def is_dataset_id(path: str) -> bool:
    """Whether a name that `open_source` takes is a dataset's of the hub, and not a file's or a folder's."""
    here = named_path(path)
    return hub_rows.could_be_id(path) and not here.exists() and not _is_named_like_a_file(here)


def _is_named_like_a_file(path: Path) -> bool:
    """Whether a name ends as data files do, or nearly: `rows.jsnl` is a slip, and no dataset of the hub."""
    return bool(get_close_matches(path.suffix.lower(), KINDS, n=1, cutoff=0.75))


def _names_in(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def has_splits(path: str) -> bool:
    """Whether what is named may hold several splits: a dataset of the hub, several that were saved together, or a
    folder with files that are named so."""
    here = named_path(path)
    if hub_rows.is_saved_dataset(here):
        return (here / "dataset_dict.json").is_file()
    return bool(split_names(here, _files_in(here))) if here.is_dir() else not here.exists()


def validation_files(path: str) -> str:
    """The files of validation rows that a folder holds beside training rows; empty where it holds none, or is none.

    Raises DataError (QH-D50) as `open_source` does."""
    here = named_path(path)
    if not here.is_dir() or hub_rows.is_saved_dataset(here):
        return ""
    files = _files_in(here)
    if "validation" not in split_names(here, files):
        return ""
    return listed(here, files_of_split(here, files, "validation")[0])


@contextmanager
def blamed_on(setting: str, split: str = "data.split") -> Iterator[None]:
    """Let errors about the rows that are read name the settings that they come from; readers know only `data.path` and
    `data.split`."""
    try:
        yield
    except QloraHalError as error:
        error.where = {"data.path": setting, "data.split": split}.get(error.where, error.where)
        error.fix = error.fix.replace("data.path", setting).replace("data.split", split)
        raise


def _files_in(folder: Path) -> list[Path]:
    if _is_run(folder):
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} is the output folder of a run; what it holds are no rows.",
            where="data.path",
            fix="Name the file of the rows in data.path, or choose another output_dir.",
        )
    try:
        files = sorted(_walked(folder))
    except OSError as problem:
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} cannot be searched ({problem.strerror or problem}).",
            where=str(problem.filename or folder),
            fix="Name the folder of the rows itself, or one file, in data.path.",
        ) from problem
    if not files:
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} holds no data file.",
            where="data.path",
            cause=f"Files ending in {', '.join(KINDS)} are read.",
            fix="Put a JSONL file there, or name the file itself in data.path.",
        )
    # Beside rows, a text file is a README or a license.
    rows = [file for file in files if KINDS[file.suffix.lower()] != "text file"]
    return rows or files


def _walked(folder: Path) -> Iterator[Path]:
    """The data files below a folder, less what is hidden and the output folders of runs. Raises OSError."""
    for place, folders, names in os.walk(folder, onerror=_raised):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_run(Path(place, name))]
        for name in names:
            file = Path(place, name)
            if file.suffix.lower() in KINDS and not name.startswith("."):
                _refuse_unreadable(file)
                yield file


def _refuse_unreadable(path: Path) -> None:
    """Not left out of its folder, where the other files' rows alone would be trained on; nor looked for on the hub."""
    if (kind := kind_there(path)) not in ("", "a regular file", "a folder"):
        raise DataError(
            "QH-D50",
            f"{str(path)!r} is {kind}; a file of rows is expected.",
            where=str(path),
            cause="Rows are read more than once, and the file is found again when the run is resumed.",
            fix="Write the rows into a file, and name it in data.path."
            if kind != "a link to nothing"
            else "Restore the file that the link names, or remove the link.",
        )


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_MARKS)


def _raised(problem: OSError) -> NoReturn:
    raise problem


def _folder_source(name: str, folder: Path, split: str) -> Source:
    files, alert = files_of_split(folder, _files_in(folder), split)
    source = _files_source(name, files)
    notes = (f"files: {listed(folder, files)}", *source.notes)
    return replace(source, notes=notes, alerts=(alert,) if alert else ())


def _refuse_other_kinds(files: Sequence[Path]) -> None:
    for file in files:
        if file.suffix.lower() not in KINDS:
            raise DataError(
                "QH-D51",
                f"The file {file.name!r} ends in {file.suffix!r}; one of {', '.join(KINDS)} was expected.",
                where=str(file),
                fix="Name the file by what it holds, for example rows.jsonl.",
            )


def _files_source(name: str, files: Sequence[Path]) -> Source:
    _refuse_other_kinds(files)

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            for line, value in rows_in(file):
                number += 1
                yield Row(number, file.name, line, value)

    kinds = sorted({KINDS[file.suffix.lower()] for file in files})
    notes = tuple(filter(None, (separator_note(file) for file in files if KINDS[file.suffix.lower()] == "CSV")))
    kind = "+".join(kinds)
    return Source(name, kind, read, lambda: digest_of_files(files), lambda: _stamp(files), notes, files=tuple(files))


def _stamp(files: Sequence[Path]) -> object:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
