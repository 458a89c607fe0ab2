"""Row files that are not what their name says, tables with a name twice, and keys that a row cannot keep."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_hal.data import PreparedData
from qlora_hal.data.source.in_memory import keep_rows, kept_rows, rows_in_memory
from qlora_hal.data.source.json_text import decoded
from qlora_hal.data.source.reading import open_source
from qlora_hal.errors import DataError

Prepare = Callable[..., PreparedData]

ROW = '{"text": "café"}'
FILES = {
    "rows.jsonl": ROW + "\n" + ROW,
    "rows.json": f"[{ROW},\n {ROW}]",
    "rows.csv": "text,more\ncafé,1\n",
    "rows.tsv": "text\tmore\ncafé\t1\n",
}
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.fault("D04")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_text_in_utf16_or_utf32_is_asked_for_in_utf8(
    name: str, encoding: str, on_bad_row: str, prepared: Prepare
) -> None:
    with pytest.raises(DataError, match=r"QH-D04") as caught:
        prepared(FILES[name].encode(encoding), name=name, on_bad_row=on_bad_row)
    assert caught.value.message == f"{name} is {encoding[:6].upper()} text; UTF-8 was expected."
    assert caught.value.where == f"{name}:1:1"
    assert caught.value.fix == "Save the file as UTF-8."


@pytest.mark.fault("D04")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman"])
def test_text_of_a_code_page_is_asked_for_in_utf8_with_the_place_of_the_byte(
    name: str, encoding: str, prepared: Prepare
) -> None:
    with pytest.raises(DataError, match=r"QH-D04.*not UTF-8 text") as caught:
        prepared(FILES[name].encode(encoding), name=name)
    assert caught.value.fix.startswith("Save the file as UTF-8")
    assert caught.value.where.startswith(f"{name}:{2 if name[-3:] in ('csv', 'tsv') else 1}:")


@pytest.mark.parametrize("name", FILES)
def test_utf8_is_read_with_and_without_a_mark(name: str, prepared: Prepare) -> None:
    plain, marked = (prepared(FILES[name].encode(encoding), name=name) for encoding in ("utf-8", "utf-8-sig"))
    assert plain.train.tokens.tolist() == marked.train.tokens.tolist()
    assert plain.report.train.rows_used >= 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
OTHERS: Mapping[str, tuple[bytes, str, str]] = {
    "a pointer": (POINTER, "a Git LFS pointer, not the file itself", "git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page", "Download the file itself"),
    "gzip": (gzip.compress(ROW.encode()), "a gzip archive", "Unpack"),
    "a spreadsheet": (b"PK\x03\x04\x14\x00", "a zip archive (as .xlsx is one)", "Unpack or convert"),
    "Arrow": (b"ARROW1\x00\x00", "an Arrow file", "name the file by what it holds"),
}


@pytest.mark.fault("D04")
@pytest.mark.parametrize("name", [*FILES, "rows.parquet"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_file_that_is_something_else_is_told_as_that(name: str, other: str, prepared: Prepare) -> None:
    content, what, fix = OTHERS[other]
    with pytest.raises(DataError, match="QH-D04") as caught:
        prepared(content, name=name)
    assert caught.value.message == f"{name} is {what}."
    assert fix in caught.value.fix


@pytest.mark.fault("D04")
def test_a_parquet_file_of_another_name_is_told_as_that(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl is a Parquet file"):
        prepared(b"PAR1\x15\x04", name="rows.jsonl")


@pytest.mark.fault("D04")
def test_zero_bytes_are_told_as_damage(prepared: Prepare) -> None:
    good = ROW.encode() + b"\n"
    with pytest.raises(DataError, match=r"QH-D04.*there is a zero byte; the file is damaged") as caught:
        prepared(good + b"\0" * 100)
    assert caught.value.where == "rows.jsonl:2:1"
    assert prepared(good + b"\0" * 100, on_bad_row="skip").report.train.bad_row_count == 1
    with pytest.raises(DataError, match="there is a zero byte"):
        prepared(b"[" + ROW.encode() + b",\0\0\0\0]", name="rows.json")


# names that stand twice ----------------------------------------------------------------------------------------------


@pytest.mark.fault("D04")
@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("instruction,output,output\na,b,c\n", "1 column names more than once: 'output'"),
        ("instruction,output,instruction,output\na,b,c,d\n", "2 column names more than once: 'instruction', 'output'"),
        ("instruction;output;output\na;b;c\n", "'output'"),
        ("instruction,output,output\n", "'output'"),
    ],
)
def test_two_columns_of_one_name_are_refused(text: str, said: str, on_bad_row: str, prepared: Prepare) -> None:
    for name in ("rows.csv", "rows.tsv"):
        with pytest.raises(DataError, match="QH-D04") as caught:
            prepared(text.replace(",", "\t") if name == "rows.tsv" else text, name=name, on_bad_row=on_bad_row)
        assert said in caught.value.message
        assert caught.value.where == f"{name}:1"


@pytest.mark.fault("D04")
def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"QH-D04.*more than once: 'text'"):
        list(open_source(str(tmp_path / "rows.parquet")).rows())


TWICE = [
    '{"text": "a", "text": "b"}',
    '{"text":"a","text":"b"}',
    '{"text" : "a", "text" : "b"}',
    '{"text": "a", "text"\t: "b"}',
    '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
    '{"messages": [{"role": "user", "content": "x", "more": {"a": 1, "a": 2}}]}',
    '{"text": ["x"], "text": ["x"]}',
    '{"text": "a", "\\u0074ext": "b"}',
]


@pytest.mark.fault("D04")
@pytest.mark.parametrize("row", TWICE)
def test_a_key_that_stands_twice_is_refused_by_name(row: str, prepared: Prepare) -> None:
    good = '{"text": "good"}'
    for text, name in ((f"{good}\n{row}\n", "rows.jsonl"), (f"[{good},\n{row}]", "rows.json")):
        with pytest.raises(DataError, match=r"QH-D04.*duplicate key '(text|role|a)'") as caught:
            prepared(text, name=name)
        assert caught.value.where.startswith(f"{name}:2:")
    assert prepared(f"{good}\n{row}\n", on_bad_row="skip").report.train.bad_row_count == 1


@pytest.mark.parametrize(
    "row",
    [
        {"text": 'he said "text": and "text":'},
        {"messages": [{"role": "role", "content": 'a":"b'}], "note": {"messages": {"messages": 1}}},
        {"text": "a", "more": ["text", {"text": "x"}, {"text": "y"}]},
    ],
)
def test_a_key_that_only_looks_as_if_it_stood_twice_is_none(row: dict[str, object]) -> None:
    for separators in ((", ", ": "), (",", ":"), (" , ", " : ")):
        assert decoded(json.dumps(row, separators=separators)) == row


nested = st.recursive(
    st.none() | st.sampled_from(['"a":', "x", '": ']),
    lambda held: st.lists(held, max_size=3) | st.lists(st.tuples(st.sampled_from("abc"), held), max_size=3).map(tuple),
    max_leaves=10,
)
blanks = st.sampled_from(["", " ", "\t", "  "])


def _written(value: object, blank: str) -> str:
    """JSON of lists, and of tuples of pairs as objects that may hold a key twice."""
    if isinstance(value, tuple):
        pairs = (f"{json.dumps(key)}{blank}: {_written(held, '' if blank else ' ')}" for key, held in value)
        return "{" + ", ".join(pairs) + "}"
    return (
        "[" + ", ".join(_written(held, blank) for held in value) + "]" if isinstance(value, list) else json.dumps(value)
    )


def _repeats(value: object) -> bool:
    if isinstance(value, tuple):
        keys = [key for key, _ in value]
        return len(set(keys)) < len(keys) or any(_repeats(held) for _, held in value)
    return any(map(_repeats, value)) if isinstance(value, list) else False


@settings(deadline=None, max_examples=400)
@given(value=nested, blank=blanks)
def test_every_repeated_key_is_found_and_no_other(value: object, blank: str) -> None:
    text = _written(value, blank)
    if _repeats(value):
        with pytest.raises(ValueError, match="duplicate key"):
            decoded(text)
    else:
        assert decoded(text) == json.loads(text)


# keys that JSON cannot have ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({0: "x", "text": "a"}, {"0": "x", "text": "a"}),
        ({None: 1, True: 2, 1.5: 3, "text": "a"}, {"null": 1, "true": 2, "1.5": 3, "text": "a"}),
        ({"text": "a", "more": {1: {2: ("x", "y")}}}, {"text": "a", "more": {"1": {"2": ["x", "y"]}}}),
    ],
)
def test_keys_that_are_no_text_become_text_as_a_resume_reads_them(
    row: dict[object, object], kept: dict[str, object], tmp_path: Path, prepared: Prepare
) -> None:
    rows = rows_in_memory([row])
    assert rows == [kept]
    keep_rows(rows, tmp_path)
    assert kept_rows(tmp_path) == rows
    report = prepared(rows).report.train
    assert report.unused_columns == sorted(kept.keys() - {"text"})
    assert prepared([row]).report.train.rows_used == 1  # without train(), which takes rows in


@pytest.mark.fault("D03")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({0: "x", "0": "y", "text": "a"}, "duplicate key '0'"),
        ({"text": "a", "more": {1: "x", "1": "y"}}, "The field 'more' of the row cannot be written as JSON (duplicate"),
        ({(1, 2): "x", "text": "a"}, "The field '(1, 2)' of the row"),
        ({b"text": "a"}, "not bytes"),
    ],
)
def test_keys_that_would_be_lost_are_refused(row: dict[object, object], said: str) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        rows_in_memory([{"text": "a"}, row])
    assert said in caught.value.message
    assert caught.value.where == "data:2"
