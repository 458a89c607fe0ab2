"""From what the user named to a stream of rows, each with its file and line.

Memory stays bounded: one line (or one array element, one Parquet batch) at a time, and a row has an upper size. A row
that cannot be read is yielded as the error itself, so that `data.on_bad_row` is decided in one place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qlora_hal.data.source.row_files import KINDS, not_an_object, rows_in, separator_note
from qlora_hal.data.source.split_files import files_of_split, listed, split_names
from qlora_hal.errors import DataError, QloraHalError


class Row(NamedTuple):
    """One row of a source. `number` counts rows from 1 over all files; `line` is the line (or row) in `file`."""

    number: int
    file: str
    line: int
    value: Mapping[str, object] | DataError

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Source:
    """Rows with a name and an identity. `digest` is a SHA-256 of the contents; `rows` may be called again;
    `notes` are for the report, `alerts` also for the user at once."""

    name: str
    kind: str
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    stamp: Callable[[], object] = lambda: None
    notes: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()


def open_source(path: str, split: str = "train") -> Source:
    """The source behind a file, a folder, or a Hugging Face dataset id; of what has splits, the rows of `split`.

    Raises DataError (QH-D50 nothing there or no such split, QH-D51 kind of file or missing library) and HubError
    (QH-E11, QH-D17).
    """
    from qlora_hal.data.source import hub_rows

    here = Path(path).expanduser()
    if here.is_file():
        return _files_source(path, [here])
    if hub_rows.is_saved_dataset(here):
        return hub_rows.saved_source(here, split)
    if here.is_dir():
        return _folder_source(path, here, split)
    if hub_rows.could_be_id(path) and here.suffix.lower() not in KINDS:
        return hub_rows.hub_source(path, split)
    raise DataError(
        "QH-D50",
        f"There is no file, folder or dataset {path!r}.",
        where="data.path",
        cause="The name is neither a path on this disk nor a dataset id of the form owner/name.",
        fix="Give data.path the path of a JSONL, JSON, CSV or Parquet file.",
    )


def has_splits(path: str) -> bool:
    """Whether what is named may hold several splits: a dataset of the hub, several that were saved together, or a
    folder with files that are named so."""
    from qlora_hal.data.source import hub_rows

    here = Path(path).expanduser()
    if hub_rows.is_saved_dataset(here):
        return (here / "dataset_dict.json").is_file()
    return bool(split_names(here, _files_in(here))) if here.is_dir() else not here.exists()


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


def memory_source(rows: Sequence[Mapping[str, object]]) -> Source:
    """Rows that are already in memory, as given to `train(data=[...])`."""

    def read() -> Iterator[Row]:
        for number, value in enumerate(rows, start=1):
            yield Row(number, "data", number, value if isinstance(value, Mapping) else not_an_object(value, number))

    return Source("rows in memory", "memory", read, lambda: digest_of_values(rows))


def digest_of_values(values: Iterable[object]) -> str:
    """SHA-256 over rows in their JSON form."""
    digest = hashlib.sha256()
    for value in values:
        try:
            text = json.dumps(value, sort_keys=True, default=repr)
        except TypeError:  # keys of several types, which have no order
            text = repr(value)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes and sizes of files, in order; names do not count."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} holds no data file.",
            where="data.path",
            cause=f"Files ending in {', '.join(KINDS)} are read.",
            fix="Put a JSONL file there, or name the file itself in data.path.",
        )
    return files


def _folder_source(name: str, folder: Path, split: str) -> Source:
    files, alert = files_of_split(folder, _files_in(folder), split)
    source = _files_source(name, files)
    notes = (f"files: {listed(folder, files)}", *source.notes)
    return replace(source, notes=notes, alerts=(alert,) if alert else ())


def _files_source(name: str, files: Sequence[Path]) -> Source:
    for file in files:
        if file.suffix.lower() not in KINDS:
            raise DataError(
                "QH-D51",
                f"The file {file.name!r} ends in {file.suffix!r}; one of {', '.join(KINDS)} was expected.",
                where=str(file),
                fix="Name the file by what it holds, for example rows.jsonl.",
            )

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            for line, value in rows_in(file):
                number += 1
                yield Row(number, file.name, line, value)

    kinds = sorted({KINDS[file.suffix.lower()] for file in files})
    notes = tuple(filter(None, (separator_note(file) for file in files if KINDS[file.suffix.lower()] == "CSV")))
    return Source(name, "+".join(kinds), read, lambda: digest_of_files(files), lambda: _stamp(files), notes)


def _stamp(files: Sequence[Path]) -> object:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
