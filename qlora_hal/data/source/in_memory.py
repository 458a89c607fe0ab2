"""Rows given to `train` as Python objects: taken in once, checked, and kept beside the run for a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_hal.data.source.row_files import nested_columns, without_absent_keys
from qlora_hal.data.source.split_files import SPLIT_WORDS
from qlora_hal.data.source.tables import rows_of_columns, rows_of_table, without_empty
from qlora_hal.errors import DataError
from qlora_hal.files.opening import open_regular, refuse_link
from qlora_hal.files.replacing import replace_file
from qlora_hal.files.strict_json import unique_keys

ROWS_FILE, VALIDATION_ROWS_FILE = "rows.jsonl", "validation_rows.jsonl"


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows that were given in memory; None where they are read from files, or there are none."""

    train: Sequence[Mapping[str, object]] | None = None
    validation: Sequence[Mapping[str, object]] | None = None

    def keep(self, run_dir: Path) -> None:
        """Write them beside the run. Raises StorageError (QH-S09, QH-S11, QH-S12)."""
        for rows, name in ((self.train, ROWS_FILE), (self.validation, VALIDATION_ROWS_FILE)):
            if rows is not None:
                keep_rows(rows, run_dir, name)

    @classmethod
    def kept(cls, run_dir: Path) -> GivenRows:
        """Those that `keep` wrote. Raises DataError QH-D04, UnsafeInputError QH-X06 for a link."""
        return cls(kept_rows(run_dir), kept_rows(run_dir, VALIDATION_ROWS_FILE))


def rows_in_memory(data: object) -> list[Mapping[str, object]]:
    """The rows of a list, a generator, a Hugging Face dataset, a table (pandas, Polars, Arrow), a dict of columns, or
    any other iterable of mappings.

    A row of another kind stays as it is: `data.on_bad_row` decides on it later. Every other one is as a resume will
    read it back: None for empty cells, lists for tuples, text for keys that are numbers. Raises DataError QH-D03 for
    what holds no rows, and for a row that JSON cannot hold.
    """
    if isinstance(data, Mapping):
        data = _rows_of_mapping(data)
    elif not hasattr(data, "features") and (table := rows_of_table(data)) is not None:
        data = table
    if isinstance(data, bytes | bytearray | memoryview) or not isinstance(data, Iterable):
        is_query = hasattr(data, "collect")  # Polars computes it when it is asked to
        fix = {"fix": "Give data.collect()."} if is_query else {}
        raise _no_rows(f"a value of type {type(data).__name__}", **fix)
    rows: list[Any] = []
    for number, given in enumerate(_of_dataset(data), start=1):
        row = without_empty(given) if isinstance(given, Mapping) else given
        try:
            rows.append(json.loads(json.dumps(row), object_pairs_hook=unique_keys))
        except (TypeError, ValueError, RecursionError) as problem:
            raise _not_json(row, number, problem) from problem
    return rows


def _of_dataset(data: Iterable[Any]) -> Iterable[Any]:
    """The rows of a Hugging Face dataset without what Arrow put into them; anything else as it is."""
    schema = getattr(getattr(data, "features", None), "arrow_schema", None)
    if schema is None:
        return data

    columns = nested_columns(schema)
    return (without_absent_keys(dict(row), columns) for row in data)


def keep_rows(rows: Sequence[Mapping[str, object]], run_dir: Path, name: str = ROWS_FILE) -> None:
    """Write the rows beside the run, one JSON text a line. Raises StorageError (QH-S09, QH-S11, QH-S12)."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # JSON escapes no lone surrogate when it keeps other characters as they are; the row comes back as it was given.
    replace_file(run_dir / name, text.encode("utf-8", "surrogatepass"))


def kept_rows(run_dir: Path, name: str = ROWS_FILE) -> list[Mapping[str, object]] | None:
    """The rows that `keep_rows` wrote, or None where the run reads a file. Raises DataError QH-D04, UnsafeInputError
    QH-X06 for a link."""
    path = run_dir / name
    refuse_link(path)
    if not path.is_file():
        return None
    # Only a line feed ends a row: str.splitlines would also break at U+2028 and its like, which JSON leaves in texts.
    try:
        with open_regular(path) as stream:
            lines = stream.read().decode("utf-8", "surrogatepass").split("\n")
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(
            "QH-D04",
            f"The rows kept with the run cannot be read ({problem}).",
            where=str(path),
            cause="The file was changed, or cut off, after train wrote it.",
            fix="Restore the file, or start a new run.",
        ) from problem


def splits_in_memory(data: object) -> tuple[object, object | None]:
    """(training rows, validation rows or None) of a mapping of splits, as a DatasetDict is; anything else as it is.

    Raises DataError QH-D03 for splits without one called train, and for several names of one split.
    """
    if not isinstance(data, Mapping) or not data or not _holds_splits(data):
        return data, None
    splits = [(SPLIT_WORDS.get(str(name), name), rows) for name, rows in data.items()]
    train, validation = ([rows for kind, rows in splits if kind == wanted] for wanted in ("train", "validation"))
    if len(train) != 1 or len(validation) > 1:
        several = "several names of one split, " if train else ""
        fix = "Give one of them: data=dataset['...'], and another one as validation_data."
        raise _no_rows(f"a mapping with {several}the splits {_keys_of(data)}", fix)
    return train[0], next(iter(validation), None)


def _holds_splits(data: Mapping[Any, Any]) -> bool:
    """Whether the values are data sets, or lists of rows under names of splits."""
    if all(hasattr(rows, "features") for rows in data.values()):
        return True
    are_rows = all(isinstance(rows, list) and rows and isinstance(rows[0], Mapping) for rows in data.values())
    return are_rows and all(name in SPLIT_WORDS for name in data)


def _rows_of_mapping(data: Mapping[Any, Any]) -> list[dict[str, object]]:
    if (rows := rows_of_columns(data)) is None:
        fix = "Give a dict of columns, lists of one length, or one split: data=dataset['train']."
        raise _no_rows(f"a mapping with the keys {_keys_of(data)}", fix)
    return rows


def _keys_of(data: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(data)[:5]))


def _no_rows(
    what: str, fix: str = 'Give a list of rows such as {"messages": [...]}, a dataset, or the path of a file.'
) -> DataError:
    return DataError(
        "QH-D03",
        f"data is {what}; a path, or an iterable of rows (such as a list of mappings), was expected.",
        where="data",
        fix=fix,
    )


def _not_json(row: object, number: int, problem: Exception) -> DataError:
    fields = row.items() if isinstance(row, dict) else ()
    field = next((str(key) for key, value in fields if not _is_json({key: value})), "")
    named = f"The field {field!r} of the row" if field else "The row"
    return DataError(
        "QH-D03",
        f"{named} cannot be written as JSON ({problem}); text, numbers, lists and mappings were expected.",
        where=f"data:{number}",
        cause="Rows given in memory are kept with the run, so that it can be resumed.",
        fix="Turn the value into text or numbers, or remove the field.",
        context={"field": field},
    )


def _is_json(value: object) -> bool:
    try:
        json.loads(json.dumps(value), object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
