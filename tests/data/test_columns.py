"""Rows whose columns have names of the user's own: named by data.columns, recognized where only one reading is left, or
answered with the line that names them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.config.schema import FORMAT_COLUMNS
from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.source.row_formats import USED_COLUMNS, Shape
from qlora_hal.errors import ConfigError, DataError

Prepare = Callable[..., PreparedData]
Trained = Callable[..., list[str]]

ROW = {"frage": "1 + 2?", "antwort": "3"}


def text_of(data: PreparedData, tokenizer: ChatTokenizer, row: int = 0) -> str:
    return tokenizer.decode(data.train.row(row)[0].tolist(), skip_special_tokens=False)


def test_names_on_the_left_are_those_of_the_formats() -> None:
    assert set(FORMAT_COLUMNS) == set().union(*USED_COLUMNS.values())
    assert set(USED_COLUMNS) == set(get_args(Shape))


@pytest.mark.parametrize(
    ("columns", "row", "as_if"),
    [
        ({"prompt": "frage", "completion": "antwort"}, ROW, {"prompt": "1 + 2?", "completion": "3"}),
        ({"instruction": "frage", "output": "antwort"}, ROW, {"instruction": "1 + 2?", "output": "3"}),
        (
            {"instruction": "frage", "input": "mit", "output": "antwort", "system": "rolle"},
            {**ROW, "mit": "Zahlen", "rolle": "Kurz."},
            {"instruction": "1 + 2?", "input": "Zahlen", "output": "3", "system": "Kurz."},
        ),
        ({"text": "frage"}, ROW, {"text": "1 + 2?"}),
        (
            {"messages": "dialog"},
            {"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        ),
        # Two that change places.
        (
            {"instruction": "output", "output": "instruction"},
            {"instruction": "3", "output": "1 + 2?"},
            {"instruction": "1 + 2?", "output": "3"},
        ),
        # What is named counts before what the keys show.
        (
            {"prompt": "frage", "completion": "antwort"},
            {**ROW, "messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "no"}]},
            {"prompt": "1 + 2?", "completion": "3"},
        ),
    ],
)
def test_columns_stand_for_the_names_that_they_are_given(
    columns: Mapping[str, str], row: Mapping[str, object], as_if: Mapping[str, object], prepared: Prepare
) -> None:
    named, usual = prepared([row], columns=columns), prepared([as_if])
    assert named.train.tokens.tolist() == usual.train.tokens.tolist()
    assert named.train.trained.tolist() == usual.train.trained.tolist()
    assert named.fingerprint != usual.fingerprint


def test_validation_rows_have_the_same_columns(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("frage,antwort\n2 + 2?,4\n")
    columns = {"instruction": "frage", "output": "antwort"}
    data = prepared([ROW], columns=columns, validation_path=str(tmp_path / "held.csv"))
    assert data.validation is not None
    assert len(data.validation) == 1


def test_a_column_whose_name_another_one_is_given_is_told_as_not_used(prepared: Prepare) -> None:
    data = prepared([{**ROW, "prompt": "no"}], columns={"prompt": "frage", "completion": "antwort"})
    assert list(data.report.train.unused_columns) == ["prompt (the file's own)"]


@pytest.mark.fault("D66")
def test_a_column_that_a_row_does_not_have_is_told_with_those_it_has(prepared: Prepare) -> None:
    columns = {"instruction": "frage", "output": "antwrt"}
    with pytest.raises(DataError, match=r"QH-D66.*no column 'antwrt'.*output; it has frage, antwort") as caught:
        prepared([ROW], columns=columns)
    assert caught.value.where == "data:1"
    assert "'antwort'" in caught.value.fix
    skipped = prepared(
        [ROW, {"frage": "x"}], columns={"instruction": "frage", "output": "antwort"}, on_bad_row="skip"
    ).report.train
    assert (skipped.rows_used, skipped.bad_row_count) == (1, 1)


@pytest.mark.fault("D66")
def test_a_column_that_may_be_absent_must_be_in_some_row(prepared: Prepare) -> None:
    columns = {"instruction": "frage", "output": "antwort", "system": "rolle"}
    assert len(prepared([ROW, {**ROW, "rolle": "Kurz."}], columns=columns).train) == 2
    with pytest.raises(DataError, match=r"QH-D66.*No row of rows in memory has the column 'rolle'"):
        prepared([ROW, ROW], columns=columns)


@pytest.mark.fault("D66")
def test_a_name_that_the_format_does_not_have_is_refused(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D66.*names system, which rows of the format text do not have"):
        prepared([ROW], columns={"text": "frage", "system": "antwort"})
    with pytest.raises(DataError, match=r"QH-D66.*names completion, prompt.*the format text"):
        prepared([{**ROW, "text": "x"}], columns={"prompt": "frage", "completion": "antwort"}, format="text")


def test_errors_name_the_users_own_column(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"field output \(column 'antwort'\) holds a number"):
        prepared([{"frage": "x", "antwort": 3}], columns={"instruction": "frage", "output": "antwort"})
    turns = [{"role": "user", "content": 3}]
    with pytest.raises(DataError, match=r"field messages\[0\].content \(column 'dialog'\) holds a number"):
        prepared([{"dialog": turns}], columns={"messages": "dialog"})


@pytest.mark.fault("U01")
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"promt": "frage"}, "'promt' is no name that a format has"),
        ({"prompt": "frage", "completion": "frage"}, "each column is expected once"),
        ({"prompt": None}, "a mapping of names to values is expected"),
    ],
)
def test_columns_that_can_mean_nothing_are_refused_as_settings(columns: Mapping[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve_settings({"data": {"columns": columns}}, environ={})


def test_columns_are_typed_as_flags_whatever_they_are_called() -> None:
    typed: Any = {"instruction": "1", "output": "true"}
    assert resolve_settings(None, flags={"data.columns": {"instruction": "1"}}, environ={}).config.data.columns == {
        "instruction": "1"
    }
    written = resolve_settings({"data": {"columns": {**typed, "instruction": 1}}}, environ={})
    assert written.config.data.columns == typed


# common pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("input", "output"),
        ("user", "assistant"),
        ("instruction", "response"),
        ("query", "response"),
        ("prompt", "response"),
        ("problem", "solution"),
        ("Question", "Answer"),
    ],
)
def test_common_pairs_are_a_question_and_its_answer_and_said_so(question: str, answer: str, prepared: Prepare) -> None:
    data = prepared([{question: "1 + 2?", answer: "3", "id": 7}])
    assert data.train.tokens.tolist() == prepared([{"instruction": "1 + 2?", "output": "3"}]).train.tokens.tolist()
    (note,) = [line for line in data.report.lines() if "data.columns" in line]
    assert note.startswith(f"the columns {question} and {answer} are read as instruction and output")
    assert "columns not used: id" in data.report.lines()


def lines_of(error: DataError) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    """(what the line says in a settings file, what its flag says) of each line that an error offers."""
    found = []
    for line, flag in re.findall(r"\n    (data\.columns: .*)\n    (--data\.columns .*)", error.fix):
        in_file = resolve_settings(YAML(typ="safe").load(line), environ={}).config.data.columns
        name, value = shlex.split(flag)
        typed = resolve_settings(None, flags={name.removeprefix("--"): value}, environ={}).config.data.columns
        found.append((in_file, typed))
    return found


@pytest.mark.fault("D03")
@pytest.mark.parametrize(
    ("row", "lines"),
    [
        ({"Frage, lang": "a", "Antwort 'kurz'": "b"}, [{"instruction": "Frage, lang", "output": "Antwort 'kurz'"}]),
        (
            {"question": "a", "context": "c", "answer": "b"},
            [
                {"instruction": "question", "input": "context", "output": "answer"},
                {"instruction": "question", "output": "answer"},
            ],
        ),
        (
            {"problem": "a", "solution": "b", "answer": "c"},
            [{"instruction": "problem", "output": "solution"}, {"instruction": "problem", "output": "answer"}],
        ),
        (
            {"instruction": "a", "input": "b", "response": "c"},
            [{"instruction": "instruction", "input": "input", "output": "response"}],
        ),
        ({"document": "a"}, [{"text": "document"}]),
        ({"title": "t", "answer": "b"}, [{"instruction": "title", "output": "answer"}]),
        ({"dialog": [{"role": "user", "content": "a"}], "id": 1}, [{"messages": "dialog"}]),
    ],
)
def test_the_error_prints_lines_to_paste_that_train_the_row(
    row: Mapping[str, object], lines: list[Mapping[str, str]], prepared: Prepare
) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        prepared([row])
    assert lines_of(caught.value) == [(line, line) for line in lines]
    if "dialog" not in row:  # which has no answer yet
        assert len(prepared([row], columns=lines[0]).train) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "label": 2},
        {"id": "a", "data": ["Hi", "Hello."]},  # UltraChat
        {"id": "a", "title": "t", "context": "c", "question": "q", "answers": {"text": ["b"]}},  # SQuAD
        {"doc_id": "a", "url": "u"},
    ],
    ids=["numbers", "ultrachat", "squad", "a link"],
)
def test_where_no_column_can_be_a_text_no_line_is_offered(row: Mapping[str, object], prepared: Prepare) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        prepared([row])
    assert "data.columns" not in caught.value.fix


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"question": "a", "answer": None}, "Fill in the answer"),
        ({"question": "a"}, "Fill in the answer"),
        ({"id": "7", "question": "a", "answer": None}, "Fill in the answer"),
        ({"question": None, "answer": "b"}, "Fill in the question"),
    ],
    ids=["no answer", "no column of answers", "no answer beside an id", "no question"],
)
def test_an_empty_half_of_a_pair_is_to_be_filled_in_before_the_other_becomes_a_text(
    prepared: Prepare, row: dict[str, object], missing: str
) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        prepared([{"question": "x", "answer": "y"}, row])
    assert caught.value.fix.startswith(missing)
    assert "data.on_bad_row" in caught.value.fix
    assert prepared([{"question": "x", "answer": "y"}, row], on_bad_row="skip").report.train.rows_used == 1
