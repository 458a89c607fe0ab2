"""Rows given to `train` as Python objects: taken in once, checked, and kept beside the run for a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_hal.data.source.row_files import nested_columns, without_absent_keys
from qlora_hal.errors import DataError
from qlora_hal.files.opening import open_regular, refuse_link
from qlora_hal.files.replacing import replace_file
from qlora_hal.files.strict_json import unique_keys

ROWS_FILE = "rows.jsonl"


def rows_in_memory(data: object) -> list[Mapping[str, object]]:
    """The rows of a list, a generator, a Hugging Face dataset, or any other iterable of mappings.

    A row of another kind stays as it is: `data.on_bad_row` decides on it later. Every other one is as a resume will
    read it back: lists for tuples, text for keys that are numbers. Raises DataError QH-D03 for what holds no rows, a
    table, and a row that JSON cannot hold.
    """
    if isinstance(data, Mapping):
        keys = ", ".join(map(repr, list(data)[:5]))
        raise _no_rows(f"a mapping with the keys {keys}", "Give one split of it: data=dataset['train'].")
    if rows_of_table := _rows_of_table(data):
        raise _no_rows(f"a table of type {type(data).__name__}", f"Give its rows: data=table.{rows_of_table}.")
    if isinstance(data, bytes | bytearray | memoryview) or not isinstance(data, Iterable):
        raise _no_rows(f"a value of type {type(data).__name__}")
    rows: list[Any] = []
    for number, given in enumerate(_of_dataset(data), start=1):
        row = dict(given) if isinstance(given, Mapping) else given
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


def keep_rows(rows: Sequence[Mapping[str, object]], run_dir: Path) -> None:
    """Write the rows beside the run, one JSON text a line. Raises StorageError (QH-S09, QH-S11, QH-S12)."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # JSON escapes no lone surrogate when it keeps other characters as they are; the row comes back as it was given.
    replace_file(run_dir / ROWS_FILE, text.encode("utf-8", "surrogatepass"))


def kept_rows(run_dir: Path) -> list[Mapping[str, object]] | None:
    """The rows that `keep_rows` wrote, or None where the run reads a file. Raises DataError QH-D04, UnsafeInputError
    QH-X06 for a link."""
    path = run_dir / ROWS_FILE
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


def _rows_of_table(data: object) -> str:
    """What gives the rows of a table of pandas, polars or Arrow, which iterates over its columns; "" for no table."""
    if not hasattr(data, "columns") or not hasattr(data, "shape"):
        return ""
    calls = {"to_pylist": "to_pylist()", "to_dicts": "to_dicts()", "to_dict": 'to_dict("records")'}
    return next((call for name, call in calls.items() if hasattr(data, name)), "")


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
