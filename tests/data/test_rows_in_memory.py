"""Rows given to train as Python objects: what is taken, what comes back at a resume, what is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pandas
import pyarrow
import pytest

from qlora_hal.data.source.in_memory import ROWS_FILE, keep_rows, kept_rows, rows_in_memory
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
    import datasets

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
        (pandas.DataFrame(ROWS), "a table of type DataFrame", 'data=table.to_dict("records")'),
        (pyarrow.Table.from_pylist(ROWS), "a table of type Table", "data=table.to_pylist()"),
        ({"train": ROWS, "test": ROWS}, "a mapping with the keys 'train', 'test'", "data=dataset['train']"),
    ],
)
def test_what_holds_no_rows_is_named_by_its_type(data: object, said: str, fix: str) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        rows_in_memory(data)
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert caught.value.exit_status == 4


def test_what_is_to_be_given_for_a_table_gives_its_rows() -> None:
    rows: list[dict[str, object]] = [{"text": "one"}, {"text": "two"}]
    assert rows_in_memory(pandas.DataFrame(rows).to_dict("records")) == rows
    assert rows_in_memory(pyarrow.Table.from_pylist(rows).to_pylist()) == rows


@pytest.mark.fault("D03")
def test_a_value_that_json_cannot_hold_is_refused_with_row_and_field() -> None:
    row = {"text": "a", "day": datetime.date(2026, 1, 1)}
    with pytest.raises(DataError, match="The field 'day' of the row cannot be written as JSON") as caught:
        rows_in_memory([*ROWS, row])
    assert caught.value.where == "data:3"
    with pytest.raises(TypeError):
        json.dumps(row)
