"""The lines of data files of each kind, one at a time, each as an object or as the error that it is."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from qlora_hal.data.source.json_array import ArrayFault, array_elements
from qlora_hal.data.source.json_text import MAX_ROW_VALUES, decoded, decoded_cell
from qlora_hal.errors import DataError
from qlora_hal.errors.installation import install_line
from qlora_hal.files import strict_json
from qlora_hal.files.signatures import other_encoding, what_it_is_instead

MAX_ROW_BYTES = 32 * 2**20
"""The largest row that is read; a longer line is an error, so that a file without line ends cannot fill the memory."""

MAX_COLUMNS = 10_000

KINDS: Mapping[str, str] = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".txt": "text file",
}
"""Kind of a file by how its name ends."""


def not_an_object(value: object, number: int, file: str = "data") -> DataError:
    """The error for a row that is no mapping of fields (QH-D03)."""
    return DataError(
        "QH-D03",
        f"A row is {type_name(value)}; an object with named fields was expected.",
        where=f"{file}:{number}",
        fix='Write each row as an object, for example {"messages": [...]}.',
    )


def type_name(value: object) -> str:
    """How a message names the kind of a JSON value."""
    names = {type(None): "null", bool: "a boolean", str: "a string", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else type(value).__name__)


_Value = Mapping[str, object] | DataError
_Lines = Iterator[tuple[int, _Value]]


_CORRECT_OR_SKIP = "Correct the line, or set data.on_bad_row to skip, which skips such rows and counts them."
_ONE_A_LINE = "Write each object on a line of its own, without indentation."
_SAVE_AS_UTF8 = "Save the file as UTF-8."


def malformed(file: str, line: int, column: int, reason: str, fix: str = _CORRECT_OR_SKIP) -> DataError:
    """The error for text that is not JSON (QH-D04), with line and column from 1."""
    return DataError(
        "QH-D04",
        f"This is not JSON: {reason}.",
        where=f"{file}:{line}:{column}",
        fix=fix,
        context={"line": line, "column": column},
    )


def refuse_other_content(path: Path) -> None:
    """Raise DataError (QH-D04) for a file whose beginning shows that it is not what its name says: text in another
    encoding than UTF-8, a pointer of Git LFS, a web page, an archive."""
    with path.open("rb") as stream:
        beginning = stream.read(4096)
    encoding = other_encoding(beginning)
    found = (f"{encoding} text; UTF-8 was expected", _SAVE_AS_UTF8) if encoding else what_it_is_instead(path, beginning)
    if found is None:
        return
    what, fix = found
    raise DataError("QH-D04", f"{path.name} is {what}.", where=f"{path.name}:1:1", fix=fix)


def _too_long(file: str, line: int) -> DataError:
    return DataError(
        "QH-D07",
        f"A row has more than {MAX_ROW_BYTES // 2**20} MiB, the most that is read as one row.",
        where=f"{file}:{line}",
        cause="The memory of the reader stays bounded, no matter what the file holds.",
        fix="Split the row, or write one JSON object on each line.",
    )


def _jsonl_lines(path: Path) -> _Lines:
    with path.open("rb", buffering=2**20) as stream:
        line = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            line += 1
            if len(raw) > MAX_ROW_BYTES:
                while not raw.endswith(b"\n") and (raw := stream.readline(MAX_ROW_BYTES)):
                    pass
                yield line, _too_long(path.name, line)
                continue
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if (value := _parse_line(raw, path.name, line)) is not None:
                yield line, value


def _parse_line(raw: bytes, file: str, line: int) -> _Value | None:
    """One line as an object, as an error, or None when it is blank."""
    # Counted first: a line of 32 MiB can become a gigabyte of empty lists.
    if len(raw) > MAX_ROW_VALUES and sum(map(raw.count, (b",", b"[", b"{"))) > MAX_ROW_VALUES:
        return malformed(file, line, 1, f"a row holds more than {MAX_ROW_VALUES} values")
    try:
        text = raw.decode("utf-8")
        value = decoded(text)
    except UnicodeDecodeError as error:
        fix = f"{_SAVE_AS_UTF8[:-1]}, or set data.on_bad_row to skip, which skips such rows and counts them."
        return malformed(file, line, error.start + 1, f"byte 0x{raw[error.start]:02x} is not UTF-8 text", fix)
    except json.JSONDecodeError as error:
        if not raw.strip():
            return None
        column = min(_place(error), len(text.rstrip())) + 1
        if _goes_on(text):
            reason = "it goes on in the next line, where JSON Lines (.jsonl) hold one object on each line"
            return malformed(file, line, column, reason, _ONE_A_LINE)
        return malformed(file, line, column, _reason(error))
    except ValueError as error:
        return malformed(file, line, _column_of(text, str(error)), str(error).split(";")[0])
    except RecursionError:
        return malformed(file, line, 1, "values are nested too deeply")
    if isinstance(value, dict) and raw.count(b"[") + raw.count(b"{") <= strict_json.MAX_DEPTH:
        return value
    return _sound(value, file, line)


def _goes_on(text: str) -> bool:
    """Whether a line is the beginning of something that was written over several lines."""
    written = text.strip()
    return written[:1] in ("{", "[") and written[-1:] in ("{", "[", ",")


def _sound(value: object, file: str, line: int) -> _Value:
    """The row, or the error that it is: no object, or nested so deeply that nothing can walk through it."""
    if not isinstance(value, dict):
        return not_an_object(value, line, file)
    try:
        strict_json.refuse_depth(value)
    except strict_json.JsonProblem as problem:
        return malformed(file, line, 1, str(problem))
    return value


def _column_of(text: str, message: str) -> int:
    """Where the word of a message that has no place of its own stands: NaN, or a key that stands twice."""
    word = message.rpartition("duplicate key ")[2] if "duplicate key " in message else message.split(" ", 1)[0]
    return max(1, text.rfind(word.replace("'", '"')) + 1)


def _place(error: json.JSONDecodeError) -> int:
    """Where the text stops being JSON. Of a comma before an end, Python 3.13 tells the comma, earlier ones the end."""
    behind = error.doc[error.pos + 1 :]
    is_last_comma = error.doc[error.pos : error.pos + 1] == "," and behind.lstrip()[:1] in ("}", "]")
    return len(error.doc) - len(behind.lstrip()) if is_last_comma else error.pos


def _reason(error: json.JSONDecodeError) -> str:
    if "\0" in error.doc[error.pos : error.pos + 1]:
        return "there is a zero byte; the file is damaged, or was never written completely"
    place = _place(error)
    before = error.doc[:place].rstrip()
    after = error.doc[place:].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]", ""):
        return "a comma precedes the end of the list or object"
    if after.startswith("'"):
        return "strings are written in single quotes; JSON has double quotes"
    return error.msg[:1].lower() + error.msg[1:]


def _json_lines(path: Path) -> _Lines:
    with path.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{") and start.partition(b"\n")[0].rstrip().endswith((b"{", b"[")):
        reason = "one object over several lines, where a list of rows, or one row on each line was expected"
        raise _one_object(path.name, reason)
    return _array_lines(path) if start.startswith(b"[") else _jsonl_lines(path)


def _one_object(file: str, reason: str) -> DataError:
    return DataError(
        "QH-D04",
        f"The file holds {reason}.",
        where=f"{file}:1:1",
        fix="Put the list of rows at the top level of the file, without the object around it.",
        context={"line": 1, "column": 1},
    )


def _array_lines(path: Path) -> _Lines:
    with path.open("r", encoding="utf-8-sig") as stream:
        try:
            for line, value in array_elements(stream, (MAX_ROW_BYTES, MAX_ROW_VALUES), _reason):
                yield line, _sound(value, path.name, line)
        except ArrayFault as fault:
            if fault.too_long:
                raise _too_long(path.name, fault.line) from fault
            raise malformed(path.name, fault.line, fault.column, fault.reason) from fault
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error


def separator_of(path: Path) -> str:
    """What parts the fields: the suffix's own sign; where the header lacks that, another of , ; and tab."""
    usual = _usual_separator(path)
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as stream:
            header = stream.readline(2**16)
    except (OSError, UnicodeDecodeError):
        return usual  # told when the rows are read
    most = max((",", ";", "\t"), key=header.count)
    return usual if usual in header or most not in header else most


def separator_note(path: Path) -> str:
    """What to say of a file whose fields are parted otherwise than its name says; empty where there is nothing."""
    found = separator_of(path)
    return f"{path.name}: fields are separated by {_shown(found)}" if found != _usual_separator(path) else ""


def _usual_separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _shown(separator: str) -> str:
    return "tabs" if separator == "\t" else f"{separator!r}"


def _csv_lines(path: Path) -> _Lines:
    separator = separator_of(path)
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a limit of the csv module itself; put back below
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(_bounded_lines(stream, path.name, separator), delimiter=separator, strict=True)
            if len(reader.fieldnames or ()) > MAX_COLUMNS:
                raise _too_many_columns(path.name, len(reader.fieldnames or ()))
            _refuse_repeated_columns(path, reader.fieldnames or ())
            for value in reader:
                if None in value or None in value.values():
                    yield reader.line_num, _ragged(path.name, reader.line_num, reader.fieldnames or ())
                else:
                    yield reader.line_num, value
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except csv.Error as error:
        raise _broken_csv(path.name, reader.line_num + 1, str(error)) from error
    finally:
        csv.field_size_limit(before)


def _refuse_repeated_columns(path: Path, names: Sequence[str]) -> None:
    """Raise DataError (QH-D04): a row could hold only one of two columns of a name, and which is a guess."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            "QH-D04",
            f"{path.name} has {len(repeated)} column names more than once: {', '.join(map(repr, repeated[:5]))}.",
            where=f"{path.name}:1",
            cause="A row is read by the names of its columns, so one of them would be lost.",
            fix="Rename or remove the columns that are not needed.",
            context={"columns": repeated},
        )


def _bounded_lines(stream: TextIO, file: str, separator: str) -> Iterator[str]:
    """The lines of a text; one that has no end within the largest row is an error, before it fills the memory."""
    number = 0
    while text := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(text) > MAX_ROW_BYTES or text.count(separator) > MAX_ROW_VALUES:
            raise _too_long(file, number)
        yield text


def _too_many_columns(file: str, count: int) -> DataError:
    return DataError(
        "QH-D04",
        f"The header names {count} columns; at most {MAX_COLUMNS} are read.",
        where=f"{file}:1:1",
        fix="Keep the columns that are trained on.",
    )


def _broken_csv(file: str, line: int, reason: str) -> DataError:
    return DataError(
        "QH-D04",
        f"This is not CSV: {reason}.",
        where=f"{file}:{line}:1",
        cause="Rows after a broken quotation cannot be told apart, so on_bad_row cannot skip it.",
        fix='Write a quotation mark inside a quoted field twice ("").',
        context={"line": line},
    )


def _not_utf8(path: Path) -> DataError:
    """The error for the first line that is not UTF-8: decoding a whole block says nothing of lines, so they are asked
    one by one. Raises AssertionError when all are."""
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(
                    "QH-D04",
                    f"Byte 0x{raw[error.start]:02x} is not UTF-8 text.",
                    where=f"{path.name}:{line}:{error.start + 1}",
                    cause="Spreadsheets often write a code page of Windows instead.",
                    fix="Save the file as UTF-8.",
                    context={"line": line, "column": error.start + 1},
                )
    raise AssertionError(f"every line of {path} is UTF-8")


def _ragged(file: str, line: int, names: Sequence[str]) -> DataError:
    return DataError(
        "QH-D04",
        f"The line has more or fewer fields than the header, which names {len(names)} ({', '.join(names)}).",
        where=f"{file}:{line}:1",
        fix="Quote fields that hold commas or line ends.",
    )


def _parquet_lines(path: Path) -> _Lines:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_library("pyarrow", "Parquet files") from error
    try:
        line = 0
        with parquet.ParquetFile(path) as file:
            _refuse_repeated_columns(path, file.schema_arrow.names)
            nested = nested_columns(file.schema_arrow, reads_json=True)
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
                for value in rows_of_batch(batch):
                    line += 1
                    yield (
                        line,
                        without_absent_keys(value, nested) if isinstance(value, dict) else _repeating(path, line),
                    )
    except (arrow.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:  # names are bytes in the file
        raise DataError(
            "QH-D04",
            f"The Parquet file cannot be read ({str(error).splitlines()[0]}).",
            where=f"{path.name}:{line + 1}:1",
            fix="Write the file again; it may be cut off.",
        ) from error


def rows_of_batch(batch: Any) -> Iterator[dict[str, object] | None]:
    """The rows of a batch, their maps as objects; None for one in which an object has a key twice."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (KeyError, ValueError) as error:
        if "duplicate" not in str(error):
            raise
        if batch.num_rows == 1:
            yield None
            return
        for number in range(batch.num_rows):
            yield from rows_of_batch(batch.slice(number, 1))


def _repeating(path: Path, line: int) -> DataError:
    return DataError(
        "QH-D04",
        "An object of the row has a key more than once.",
        where=f"{path.name}:{line}:1",
        cause="A map of a table may hold a key twice; of an object, one of the two values would be lost.",
        fix=_CORRECT_OR_SKIP,
        context={"line": line},
    )


_Pruner = Callable[[object], object]


def nested_columns(schema: Any, *, reads_json: bool = False) -> Mapping[str, _Pruner]:
    """The columns of an Arrow schema that hold objects, as turns and tools are, and what takes the keys without a value
    out of each. With `reads_json`, texts that are JSON by their type are read, as `datasets` itself does."""

    def holds_objects(kind: Any) -> bool:
        is_json = reads_json and _is(kind, "extension<arrow.json>")
        return _is(kind, "struct<") or is_json or any(holds_objects(inner) for inner in _inner_types(kind).values())

    return {field.name: _pruner_of(field.type, reads_json) for field in schema if holds_objects(field.type)}


def without_absent_keys(value: dict[str, object], columns: Mapping[str, _Pruner]) -> dict[str, object]:
    """A row whose `columns` have no keys without a value. Arrow gives every object of a column the keys of all: a tool
    would show the parameters of the others. A map has keys of its own, and keeps them."""
    for name, pruned in columns.items():
        value[name] = pruned(value.get(name))
    return value


def _pruner_of(kind: Any, reads_json: bool) -> _Pruner:
    if reads_json and _is(kind, "extension<arrow.json>"):
        return _read_json
    if _is(kind, "map<"):
        item = _pruner_of(kind.item_type, reads_json)
        return lambda held: {key: item(one) for key, one in held.items()} if isinstance(held, dict) else held
    inner = {name: _pruner_of(field, reads_json) for name, field in _inner_types(kind).items()}
    if _is(kind, "struct<"):
        return lambda held: (
            {key: inner[key](one) if key in inner else one for key, one in held.items() if one is not None}
            if isinstance(held, dict)
            else held
        )
    if len(inner) == 1:
        element = next(iter(inner.values()))
        return lambda held: [element(one) for one in held] if isinstance(held, list) else held
    return lambda held: held


def _read_json(held: object) -> object:
    """What a text holds that is JSON by its type; one that is none stays a text."""
    if not isinstance(held, str):
        return held
    try:
        return decoded_cell(held)
    except (ValueError, RecursionError):
        return held


def _inner_types(kind: Any) -> dict[str, Any]:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    return {field.name: field.type for field in fields}


def _is(kind: Any, name: str) -> bool:
    return str(kind).startswith(name)


def _rows_at_once(metadata: Any) -> int:
    """Rows of a Parquet file that are decoded together. A value that is stored once can stand in every row, so that a
    group's whole size says nothing of what its rows take: only the largest value that it can hold does."""
    # Not the sizes of its columns: pyarrow 26 ends the process where their statistics are damaged.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=1)
    return max(1, min(64, 4 * MAX_ROW_BYTES // min(max(largest, 1), MAX_ROW_BYTES)))


def _whole_text(path: Path) -> _Lines:
    """The one row of a text file: a file is one text, as a document is, with its end token behind it."""
    if path.stat().st_size > MAX_ROW_BYTES:
        raise DataError(
            "QH-D07",
            f"{path.name} has more than {MAX_ROW_BYTES // 2**20} MiB, the most that is read as one text.",
            where=path.name,
            fix="Split it into several files of one folder, where one text ends and the next begins.",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    yield 1, {"text": text}


def missing_library(name: str, what: str) -> DataError:
    """The error when an optional library is not installed (QH-D51)."""
    return DataError(
        "QH-D51",
        f"Reading {what} needs the library {name}, which is not installed.",
        where="data.path",
        fix=f"Run: {install_line('data')}",
    )


_READERS: Mapping[str, Callable[[Path], _Lines]] = {
    "JSONL": _jsonl_lines,
    "JSON": _json_lines,
    "CSV": _csv_lines,
    "Parquet": _parquet_lines,
    "text file": _whole_text,
}


def rows_in(path: Path) -> _Lines:
    """(line, row or error) of each row of a file. Raises DataError (QH-D04, QH-D51)."""
    refuse_other_content(path)
    return _READERS[KINDS[path.suffix.lower()]](path)
