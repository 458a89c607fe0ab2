"""Rows of tables in memory: frames of pandas and Polars, tables of Arrow, what hands out an Arrow stream (DuckDB), and
dicts of columns. Tables are recognized by what they can do, so that none of these libraries is needed here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import numpy as np

from qlora_hal.data.source.row_files import (
    missing_library,
    nested_columns,
    rows_of_batch,
    without_absent_keys,
)
from qlora_hal.errors import DataError

_NO_VALUE = frozenset({"NAType", "NaTType", "NoneType"})
"""Types by which pandas says that a cell is empty."""


def rows_of_table(data: Any) -> Iterable[Mapping[str, object]] | None:
    """The rows of a table; None for what is none. Raises DataError QH-D03 for two columns of one name and for a column
    alone, QH-D51 where pyarrow is missing to read an Arrow stream."""
    if hasattr(data, "iter_rows") and hasattr(data, "columns"):
        return map(_plain_row, data.iter_rows(named=True))  # Polars, which has no two columns of one name
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        _refuse_repeated(data.columns)
        return map(_plain_row, data.to_dict("records"))
    if hasattr(data, "__arrow_c_stream__"):
        return _rows_of_stream(data)
    return None


def rows_of_columns(data: Mapping[Any, Any]) -> list[dict[str, object]] | None:
    """The rows of a dict of columns, lists of one length; None for any other mapping."""
    columns = {name: column for name, held in data.items() if (column := _as_list(held)) is not None}
    if not columns or len(columns) < len(data) or len({len(column) for column in columns.values()}) != 1:
        return None
    return [_plain_row(dict(zip(columns, held, strict=True))) for held in zip(*columns.values(), strict=True)]


def _as_list(column: object) -> Sequence[object] | None:
    if isinstance(column, list | tuple):
        return column
    return list(column) if isinstance(column, np.ndarray) or hasattr(column, "to_list") else None  # type: ignore[call-overload]


def _rows_of_stream(data: Any) -> Iterable[Mapping[str, object]]:
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise missing_library("pyarrow", "an Arrow table") from error
    try:
        stream = arrow.RecordBatchReader.from_stream(data)
    except arrow.ArrowException as error:
        raise DataError(
            "QH-D03",
            f"data is a single column of type {type(data).__name__}; a table was expected.",
            where="data",
            fix='Give the table, or a dict with the column under its name: data={"text": column}.',
        ) from error
    _refuse_repeated(stream.schema.names)
    nested = nested_columns(stream.schema, reads_json=True)
    rows = (row for batch in stream for row in rows_of_batch(batch))
    return (
        without_absent_keys(row, nested) if row is not None else _refuse_repeating(number)
        for number, row in enumerate(rows, start=1)
    )


def _refuse_repeating(number: int) -> NoReturn:
    raise DataError(
        "QH-D03",
        "An object of the row has a key more than once.",
        where=f"data:{number}",
        cause="A map of a table may hold a key twice; of an object, one of the two values would be lost.",
        fix="Correct the row, or leave it out.",
    )


def _refuse_repeated(names: Iterable[object]) -> None:
    if repeated := [str(name) for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            "QH-D03",
            f"The table has {len(repeated)} column names more than once: {', '.join(map(repr, repeated[:5]))}.",
            where="data",
            cause="A row is read by the names of its columns, so one of them would be lost.",
            fix="Rename or remove the columns that are not needed.",
        )


def without_empty(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row with None in the place of what libraries of tables have for an empty cell."""
    return {name: None if _is_empty(value) else value for name, value in row.items()}


def _plain_row(row: Mapping[Any, Any]) -> dict[str, object]:
    return {str(name): _plain(value) for name, value in without_empty(row).items()}


def _is_empty(value: object) -> bool:
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return type(value).__name__ in _NO_VALUE or (_is_date(value) and bool(np.isnat(value)))


def _is_date(value: object) -> TypeGuard[np.datetime64 | np.timedelta64]:
    return isinstance(value, np.datetime64 | np.timedelta64)


def _plain(value: Any) -> Any:
    """A cell without NumPy's types. Objects have no keys without a value: a table gives each the keys of all."""
    if isinstance(value, np.ndarray | np.generic) and not _is_date(value):  # which NumPy would make a bare number
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items() if held is not None}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return value
