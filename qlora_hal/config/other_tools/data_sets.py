"""Data sets as other tools list them: one becomes data.path, several become data.sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_hal.config.other_tools.tables import Value


@dataclass(frozen=True, slots=True)
class DataSet:
    """One entry of a list: a file or an id of the hub, its split, and columns by the names of a format."""

    path: str
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def rows_from(found: Sequence[DataSet], notes: list[str]) -> dict[str, Value]:
    """The settings that name these data sets. An entry that is listed again is taken once, and `notes` says so."""
    once = {(entry.path, entry.split): entry for entry in reversed(found)}
    kept = [entry for entry in found if once.get((entry.path, entry.split)) is entry]
    if len(kept) < len(found):
        notes.append("what is listed more than once is taken once (weight in data.sources repeats rows)")
    if len(kept) != 1:
        return {"data.sources": [_source(entry) for entry in kept]} if kept else {}
    named = {"data.path": kept[0].path, "data.split": kept[0].split, "data.columns": dict(kept[0].columns)}
    return {path: value for path, value in named.items() if value}


def _source(entry: DataSet) -> dict[str, Value]:
    named = {"path": entry.path, "split": entry.split, "columns": dict(entry.columns)}
    return {name: value for name, value in named.items() if value}


def renamed(columns: Mapping[str, Value]) -> dict[str, str]:
    """Only columns that have another name than the format's own."""
    return {name: column for name, column in columns.items() if isinstance(column, str) and column not in ("", name)}


def lies_here(path: str) -> bool:
    """Whether something has this path on this disk; a text that can be no path has nothing."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL, the home of nobody
        return False


BUILDERS = frozenset({"json", "csv", "parquet", "arrow", "text"})
"""Kinds of file, which `datasets` takes in the place of a name; `data_files` beside one names the rows."""


def files_named(path: Value, data_files: Value) -> list[str]:
    """The files of this disk among `data_files` (of splits: of `train`); none where they are a part of the data set
    `path`."""
    of_train = data_files.get("train") if isinstance(data_files, Mapping) else data_files
    named = of_train if isinstance(of_train, list) else [of_train]
    files = [file for file in named if isinstance(file, str) and file]
    if not isinstance(path, str) or not path or path in BUILDERS or lies_here(path):
        return files
    return []


def whole_split(split: Value, notes: list[str]) -> str | None:
    """The split, or None where the file names a part of one, which `notes` then tells."""
    if not isinstance(split, str):
        return None
    name, bracket, _ = split.partition("[")
    if bracket:
        notes.append(f"{split} is a part of a split, which is not offered; keep the rows in a file")
    return name if name and not bracket else None
