"""Which columns of the user's rows stand for the names of a format: as `data.columns` says, or as a common pair of
names shows by itself."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import product

from qlora_hal.data.source.row_errors import shown
from qlora_hal.data.source.row_formats import EVIDENCE, USED_COLUMNS, Shape, shape_of
from qlora_hal.data.source.rows import Row, Source
from qlora_hal.data.tokens.objectives import refuse_other_objective
from qlora_hal.errors import DataError

Columns = Mapping[str, str]
"""Name in a format -> name of the user's column."""

_ASKING = ("instruction", "question", "query", "prompt", "problem", "user", "human", "input")
_ANSWERING = ("output", "answer", "response", "completion", "assistant", "solution", "reply")
_GIVEN_WITH_A_QUESTION = ("context", "passage", "document")
"""Columns that a question may need to be answered, or that may be a mere source of it: only the user knows."""
_ABOUT_A_ROW = frozenset({
    "id", "idx", "index", "uuid", "guid", "hash", "url", "source", "split", "category", "lang", "language", "date",
    "timestamp",
})  # fmt: skip
"""Columns that say which row it is or where it is from: nothing to train on."""
_MAY_BE_ABSENT = frozenset({"system", "system_prompt", "tools", "functions", "history", "input"})
_MOST_LINES = 2


def with_columns(source: Source, columns: Columns) -> Source:
    """The source with its columns under the names that `columns` gives them. Its rows are errors (QH-D66) where a
    column is missing that a format needs; one that no row has ends the reading with that error."""
    if not columns:
        return source

    def rows() -> Iterator[Row]:
        met: set[str] = set()
        row = None
        for row in source.rows():
            if isinstance(row.value, Mapping):
                met.update(column for column in columns.values() if column in row.value)
                yield _renamed(row, row.value, columns)
            else:
                yield row
        if row is not None and (missing := [column for column in columns.values() if column not in met]):
            raise DataError(
                "QH-D66",
                f"No row of {source.name} has the column {shown(missing[0])}, which data.columns names.",
                where="data.columns",
                fix="Correct the name, or remove it from data.columns.",
            )

    def digest() -> str:
        named = json.dumps(dict(columns), sort_keys=True)
        return hashlib.sha256(f"{source.digest()} {named}".encode("utf-8", "surrogatepass")).hexdigest()

    return replace(source, rows=rows, digest=digest)


def _renamed(row: Row, value: Mapping[str, object], columns: Columns) -> Row:
    for name, column in columns.items():
        if column not in value and name not in _MAY_BE_ABSENT:
            return row._replace(value=_no_such_column(row, value, name, column))
    taken = set(columns.values())
    held: dict[str, object] = {name: value[column] for name, column in columns.items() if column in value}
    for column, kept in value.items():
        if column not in taken:
            # A column of the same name as one that is read now stays in the account of what is not used.
            held[f"{column} (the file's own)" if column in columns else column] = kept
    return row._replace(value=held, columns=columns)


def _no_such_column(row: Row, value: Mapping[str, object], name: str, column: str) -> DataError:
    near = get_close_matches(column, map(str, value), n=1)
    return DataError(
        "QH-D66",
        f"The row has no column {shown(column)}, which data.columns reads as {name}; "
        f"it has {', '.join(map(str, value)) or 'none'}.",
        where=row.where,
        fix=f"Name {near[0]!r} in data.columns." if near else "Correct data.columns, or the row.",
        context={"row": row.number, "column": column},
    )


def shape_of_columns(row: Row, value: Mapping[str, object], named: Shape | None) -> tuple[Row, Shape]:
    """The row and its shape: the one `named` by data.format, that of the columns which the user named, that of its
    keys, or that of a common pair, under the names of the format.

    Raises DataError (QH-D03 unknown, QH-D66 not read).
    """
    shape = named or _shape_of_named(row, value) or shape_of(value)
    if shape is None and (pair := None if row.columns else common_pair(value)):
        row, shape = _renamed(row, value, pair), "alpaca"
    if shape is None:
        raise unrecognized(row, value)
    if unread := sorted(row.columns.keys() - USED_COLUMNS[shape]):
        raise DataError(
            "QH-D66",
            f"data.columns names {', '.join(unread)}, which rows of the format {shape} do not have.",
            where=row.where,
            cause=f"Such rows are read from {', '.join(sorted(USED_COLUMNS[shape]))}.",
            fix="Remove the name from data.columns, or set data.format to the format that is meant.",
        )
    return row, shape


def _shape_of_named(row: Row, value: Mapping[str, object]) -> Shape | None:
    return shape_of({name: value[name] for name in row.columns if name in value}) if row.columns else None


def common_pair(value: Mapping[str, object]) -> Columns | None:
    """A question and its answer under names that datasets commonly give them, where no other column could be either."""
    asking, answering, given = _likely(value)
    if len(asking) == len(answering) == 1 and not given:
        return {"instruction": asking[0], "output": answering[0]}
    return None


def _likely(value: Mapping[str, object]) -> tuple[list[str], list[str], list[str]]:
    """The columns that may hold a question, an answer, and what a question needs."""
    held = [column for column, kept in value.items() if isinstance(column, str) and kept is not None]
    groups = (_ASKING, _ANSWERING, _GIVEN_WITH_A_QUESTION)
    asking, answering, given = ([column for column in held if column.lower() in names] for names in groups)
    return asking, answering, given


def unrecognized(row: Row, value: Mapping[str, object]) -> DataError:
    """The error for a row whose keys show no shape (QH-D03), with the line by which they would."""
    refuse_other_objective(row, value, is_text=False)
    keys = ", ".join(sorted(map(str, value))) or "none"
    held = next((key for key, rows in value.items() if isinstance(rows, list) and rows and _has_shape(rows[0])), None)
    lines = _lines_to_paste(value)
    fix = "Rename the columns, or set data.format if the row is meant to have one of these formats."
    if held is not None:
        fix = f"Put the list under {held} at the top level of the file: it holds the rows."
    elif lines and not row.columns:
        which = "this line" if len(lines) == 1 else "the line that is meant"
        lead = _half_of_a_pair(value)
        put = f"{lead}, put" if lead else "Put"
        fix = "\n    ".join([f"{put} {which} into the settings file, or its flag behind the command:", *lines])
    return DataError(
        "QH-D03",
        f"The row has the keys {keys}; one of these was expected: {'; '.join(EVIDENCE.values())}.",
        where=row.where,
        fix=fix,
    )


def _half_of_a_pair(value: Mapping[str, object]) -> str:
    """What comes before a text, where a column is called like a question or an answer and the other one is empty."""
    asking, answering, _ = _likely(value)
    texts = _texts(value)
    if len(texts) != 1 or bool(asking) == bool(answering):
        return ""
    missing = "the answer" if asking else "the question"
    return (
        f"Fill in {missing}, or set data.on_bad_row to skip, which skips such rows and counts them. To train on "
        f"{texts[0]} as a text"
    )


def _has_shape(row: object) -> bool:
    return isinstance(row, Mapping) and (shape_of(row) is not None or common_pair(row) is not None)


def _lines_to_paste(value: Mapping[str, object]) -> list[str]:
    return [
        f"data.columns: {text}\n    --data.columns {shlex.quote(text)}"
        for columns in _possible(value)[:_MOST_LINES]
        for text in [json.dumps(dict(columns), ensure_ascii=False)]
    ]


def _possible(value: Mapping[str, object]) -> Sequence[Columns]:
    """What the columns of a row may stand for, the likeliest first."""
    lists = [column for column, kept in value.items() if _is_turns(kept)]
    if lists:
        return [{"messages": column} for column in lists]
    asking, answering, given = _likely(value)
    texts = _texts(value)
    if not asking or not answering:
        others = [column for column in texts if column not in (*asking, *answering, *given)]
        first = (asking or others)[:1]
        last = (answering or [column for column in others if column not in first and column.lower() != "title"])[:1]
        if first and last:
            return [{"instruction": first[0], "output": last[0]}]
        if len(texts) > 1 and (asking or answering):
            return []  # the other half is no text, as SQuAD's answers: no column stands for it
        return [{"text": column} for column in texts]
    if given:
        pair = {"instruction": asking[0], "output": answering[0]}
        return [{"instruction": asking[0], "input": given[0], "output": answering[0]}, pair]
    extra = [column for column in asking if column.lower() == "input"]
    if len(asking) == 2 and extra:  # an instruction and its input, as Alpaca has them
        question = next(column for column in asking if column not in extra)
        return [{"instruction": question, "input": extra[0], "output": column} for column in answering]
    return [{"instruction": question, "output": answer} for question, answer in product(asking, answering)]


def _texts(value: Mapping[str, object]) -> list[str]:
    """The columns of text that may be trained on."""
    texts = [str(column) for column, kept in value.items() if isinstance(kept, str)]
    return [column for column in texts if column.lower() not in _ABOUT_A_ROW and not column.lower().endswith("_id")]


def _is_turns(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith("[{")
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)
