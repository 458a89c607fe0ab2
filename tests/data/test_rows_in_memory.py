"""Rows given to train as Python objects: what is taken, what comes back at a resume, what is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest

from qlora_hal.data.source.in_memory import (
    ROWS_FILE,
    GivenRows,
    keep_rows,
    kept_rows,
    rows_in_memory,
    splits_in_memory,
)
from qlora_hal.errors import DataError

ROWS: list[dict[str, object]] = [{"text": "one"}, {"text": "two", "more": [1, None, {"a": 2.5}]}]


@pytest.mark.fault("D08")
@pytest.mark.parametrize(
    "sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n", "\n", "\ud83d", "é🙂"]
)
def test_a_row_comes_back_as_it_was_whatever_signs_it_holds(sign: str, tmp_path: Path) -> None:
    """Among them all that str.splitlines takes for the end of a line."""
    rows = [{"text": f"before{sign}after{sign}"}, {"text": "next"}]
    keep_rows(rows, tmp_path)
    assert kept_rows(tmp_path) == rows


def test_where_no_rows_were_kept_there_are_none(tmp_path: Path) -> None:
    assert kept_rows(tmp_path) is None


@pytest.mark.fault("D04")
def test_a_damaged_file_of_kept_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / ROWS_FILE).write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(DataError, match=r"QH-D04.*kept with the run") as caught:
        kept_rows(tmp_path)
    assert str(tmp_path / ROWS_FILE) in caught.value.where


def test_a_generator_and_a_dataset_are_rows() -> None:
    def generated() -> Iterator[dict[str, object]]:
        yield from ROWS

    assert rows_in_memory(generated()) == ROWS
    same = [{"text": "one"}, {"text": "two"}]
    assert rows_in_memory(datasets.Dataset.from_list(same)) == same


@pytest.mark.fault("D03")
@pytest.mark.parametrize(
    ("data", "said", "fix"),
    [
        (b"abc", "type bytes", "a list of rows"),
        (3, "type int", "a list of rows"),
        ({"train": ROWS, "n": 1}, "a mapping with the keys 'train', 'n'", "data=dataset['train']"),
        ({"text": ["a", "b"], "n": [1]}, "a mapping with the keys 'text', 'n'", "lists of one length"),
        (pyarrow.chunked_array([["a"]]), "a single column of type ChunkedArray", 'data={"text": column}'),
    ],
)
def test_what_holds_no_rows_is_named_by_its_type(data: object, said: str, fix: str) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        rows_in_memory(data)
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert caught.value.exit_status == 4


def without_library(name: str) -> Any:
    """A test of a library that the checks need not have: polars is in the extra `tests`."""
    return pytest.importorskip(name)


CHATS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "n": 1},
    {"messages": [{"role": "user", "content": "ü\u2028"}], "n": None},
]


@pytest.mark.parametrize(
    "table",
    [
        pandas.DataFrame,
        pyarrow.Table.from_pylist,
        lambda rows: pyarrow.Table.from_pylist(rows).to_reader(),
        lambda rows: without_library("polars").DataFrame(rows),
        # As pandas reads a Parquet file: NumPy's arrays in cells, and objects with the keys of all others.
        lambda rows: pyarrow.Table.from_pylist(rows).to_pandas(),
        lambda rows: datasets.Dataset.from_list(rows),
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        lambda rows: {name: pandas.Series([row[name] for row in rows]) for name in rows[0]},
    ],
)
def test_every_table_gives_its_rows(table: Callable[[list[dict[str, object]]], object]) -> None:
    assert rows_in_memory(table(CHATS)) == CHATS


@pytest.mark.parametrize("nothing", [None, float("nan"), pandas.NA, pandas.NaT, numpy.float32("nan")])
def test_an_empty_cell_is_no_value(nothing: object) -> None:
    frame = pandas.DataFrame({"text": ["a", nothing]}, dtype=object)
    assert rows_in_memory(frame) == [{"text": "a"}, {"text": None}]


@pytest.mark.parametrize(
    "given",
    [
        [{"text": "a", "score": 1.0}, {"text": "b", "score": float("nan")}],
        pyarrow.table({"text": ["a", "b"], "score": [1.0, float("nan")]}),
        {"text": ["a", "b"], "score": numpy.array([1, numpy.nan], numpy.float32)},
    ],
)
def test_an_empty_number_is_no_value_in_whatever_holds_it(given: object) -> None:
    assert rows_in_memory(given) == [{"text": "a", "score": 1.0}, {"text": "b", "score": None}]


@pytest.mark.fault("D03")
def test_a_date_is_refused_in_a_column_as_in_a_frame() -> None:
    with pytest.raises(DataError, match="The field 'day' of the row cannot be written as JSON"):
        rows_in_memory({"text": ["a"], "day": numpy.array(["2026-01-01"], "datetime64[ns]")})
    assert rows_in_memory({"text": ["a"], "day": numpy.array(["NaT"], "datetime64[ns]")}) == [
        {"text": "a", "day": None}
    ]


@pytest.mark.fault("D03")
def test_a_map_with_a_key_twice_is_refused_and_neither_value_lost() -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"calls": pyarrow.array([[("a", 1), ("b", 2)], [("a", 1), ("a", 2)]], kind)})
    assert rows_in_memory(table.slice(0, 1)) == [{"calls": {"a": 1, "b": 2}}]
    with pytest.raises(DataError, match="has a key more than once") as caught:
        rows_in_memory(table)
    assert caught.value.where == "data:2"


@pytest.mark.fault("D03")
def test_a_table_with_two_columns_of_one_name_is_refused() -> None:
    frame = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    for given in (frame, table):
        with pytest.raises(DataError, match="1 column names more than once: 'text'"):
            rows_in_memory(given)


def test_of_a_mapping_of_splits_train_and_validation_are_taken() -> None:
    rows, others = datasets.Dataset.from_list(ROWS[:1]), datasets.Dataset.from_list(ROWS[:1])
    assert splits_in_memory(datasets.DatasetDict(train=rows, validation=others)) == (rows, others)
    assert splits_in_memory({"train": ROWS, "valid": ROWS[:1]}) == (ROWS, ROWS[:1])
    assert splits_in_memory({"train": ROWS}) == (ROWS, None)
    columns = {"messages": [[{"role": "user"}]], "tools": [{"name": "a"}]}
    assert splits_in_memory(columns) == (columns, None)


@pytest.mark.fault("D03")
def test_splits_without_one_to_train_on_are_refused() -> None:
    with pytest.raises(DataError, match="a mapping with the splits 'test', 'dev'"):
        splits_in_memory({"test": ROWS, "dev": ROWS})


@pytest.mark.fault("D03")
@pytest.mark.parametrize("names", [("train", "training"), ("train", "validation", "dev")])
def test_of_two_names_of_one_split_none_is_lost(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="several names of one split"):
        splits_in_memory(dict.fromkeys(names, ROWS))


def test_rows_of_both_kinds_come_back_as_they_were(tmp_path: Path) -> None:
    GivenRows(ROWS, ROWS[:1]).keep(tmp_path)
    assert GivenRows.kept(tmp_path) == GivenRows(ROWS, ROWS[:1])


@pytest.mark.fault("D03")
def test_a_value_that_json_cannot_hold_is_refused_with_row_and_field() -> None:
    row = {"text": "a", "day": datetime.date(2026, 1, 1)}
    with pytest.raises(DataError, match="The field 'day' of the row cannot be written as JSON") as caught:
        rows_in_memory([*ROWS, row])
    assert caught.value.where == "data:3"
    with pytest.raises(TypeError):
        json.dumps(row)
