"""From what the user named to a stream of rows, each with its file and line.

Memory stays bounded: one line (or one array element, one Parquet batch) at a time, and a row has an upper size. A row
that cannot be read is yielded as the error itself, so that `data.on_bad_row` is decided in one place.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from qlora_hal.data.json_array import ArrayFault, array_elements
from qlora_hal.errors import DataError

MAX_ROW_BYTES = 32 * 2**20
"""The largest row that is read; a longer line is an error, so that a file without line ends cannot fill the memory."""

_READERS: Mapping[str, str] = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}


class Row(NamedTuple):
    """One row of a source. `number` counts rows from 1 over all files; `line` is the line (or row) in `file`."""

    number: int
    file: str
    line: int
    value: Mapping[str, object] | DataError

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Source:
    """Rows with a name and an identity. `digest` is a SHA-256 of the contents; `rows` may be called again."""

    name: str
    kind: str
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    stamp: Callable[[], object] = lambda: None


def open_source(path: str, split: str = "train") -> Source:
    """The source behind a file, a folder, or a Hugging Face dataset id.

    Raises DataError (QH-D50 nothing there, QH-D51 kind of file or missing library) and HubError (QH-E11, QH-D17).
    """
    from qlora_hal.data import hub_rows

    here = Path(path).expanduser()
    if here.is_file():
        return _files_source(path, [here])
    if hub_rows.is_saved_dataset(here):
        return hub_rows.saved_source(here, split)
    if here.is_dir():
        return _files_source(path, _files_in(here))
    if hub_rows.could_be_id(path) and here.suffix.lower() not in _READERS:
        return hub_rows.hub_source(path, split)
    raise DataError(
        "QH-D50",
        f"There is no file, folder or dataset {path!r}.",
        where="data.path",
        cause="The name is neither a path on this disk nor a dataset id of the form owner/name.",
        fix="Give data.path the path of a JSONL, JSON, CSV or Parquet file.",
    )


def memory_source(rows: Sequence[Mapping[str, object]]) -> Source:
    """Rows that are already in memory, as given to `train(data=[...])`."""

    def read() -> Iterator[Row]:
        for number, value in enumerate(rows, start=1):
            yield Row(number, "data", number, value if isinstance(value, Mapping) else not_an_object(value, number))

    return Source("rows in memory", "memory", read, lambda: digest_of_values(rows))


def not_an_object(value: object, number: int, file: str = "data") -> DataError:
    """The error for a row that is no mapping of fields (QH-D03)."""
    return DataError(
        "QH-D03",
        f"A row is {type_name(value)}; an object with named fields was expected.",
        where=f"{file}:{number}",
        fix='Write each row as {"messages": [...]}, or see docs/data.md for the other shapes.',
    )


def digest_of_values(values: Sequence[object]) -> str:
    """SHA-256 over rows in their JSON form."""
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=repr)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes and sizes of files, in order; names do not count."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def type_name(value: object) -> str:
    """How a message names the kind of a JSON value."""
    names = {type(None): "null", bool: "a boolean", str: "a string", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else type(value).__name__)


def _files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} holds no data file.",
            where="data.path",
            cause=f"Files ending in {', '.join(_READERS)} are read.",
            fix="Put a JSONL file there, or name the file itself in data.path.",
        )
    return files


def _files_source(name: str, files: Sequence[Path]) -> Source:
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise DataError(
                "QH-D51",
                f"The file {file.name!r} ends in {file.suffix!r}; one of {', '.join(_READERS)} was expected.",
                where=str(file),
                fix="Name the file by what it holds, for example rows.jsonl.",
            )

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            for line, value in _READ[_READERS[file.suffix.lower()]](file):
                number += 1
                yield Row(number, file.name, line, value)

    kinds = sorted({_READERS[file.suffix.lower()] for file in files})
    return Source(name, "+".join(kinds), read, lambda: digest_of_files(files), lambda: _stamp(files))


def _stamp(files: Sequence[Path]) -> object:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


_Value = Mapping[str, object] | DataError
_Lines = Iterator[tuple[int, _Value]]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def malformed(file: str, line: int, column: int, reason: str) -> DataError:
    """The error for text that is not JSON (QH-D04), with line and column from 1."""
    return DataError(
        "QH-D04",
        f"This is not JSON: {reason}.",
        where=f"{file}:{line}:{column}",
        fix="Correct the line, or set data.on_bad_row to skip to count such rows and go on.",
        context={"line": line, "column": column},
    )


def _too_long(file: str, line: int) -> DataError:
    return DataError(
        "QH-D07",
        f"A row has more than {MAX_ROW_BYTES // 2**20} MiB, the most that is read as one row.",
        where=f"{file}:{line}",
        cause="The memory of the reader stays bounded, whatever the file holds.",
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
                raw = _without_byte_order_mark(raw, path)
            if value := _parse_line(raw, path.name, line):
                yield line, value


def _without_byte_order_mark(raw: bytes, path: Path) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise malformed(path.name, 1, 1, "the file is UTF-16 text, and UTF-8 was expected")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _parse_line(raw: bytes, file: str, line: int) -> _Value | None:
    """One line as an object, as an error, or None when it is blank."""
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return malformed(file, line, error.start + 1, f"byte 0x{raw[error.start]:02x} is not UTF-8 text")
    except json.JSONDecodeError as error:
        if not raw.strip():
            return None
        return malformed(file, line, error.pos + 1, _reason(error))
    except ValueError as error:
        return malformed(file, line, max(1, _column_of(text, str(error))), str(error).split(";")[0])
    except RecursionError:
        return malformed(file, line, 1, "values are nested too deeply")
    return value if isinstance(value, dict) else not_an_object(value, line, file)


def _column_of(text: str, message: str) -> int:
    return text.find(message.split(" ", 1)[0]) + 1


def _reason(error: json.JSONDecodeError) -> str:
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]", ""):
        return "a comma stands before the end of the list or object"
    if after.startswith("'"):
        return "strings are written in single quotes; JSON has double quotes"
    return error.msg[:1].lower() + error.msg[1:]


def _json_lines(path: Path) -> _Lines:
    with path.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _array_lines(path) if start.startswith(b"[") else _jsonl_lines(path)


def _array_lines(path: Path) -> _Lines:
    with path.open("r", encoding="utf-8-sig") as stream:
        line = 1
        try:
            for line, value in array_elements(stream, _DECODER, MAX_ROW_BYTES, _reason):
                yield line, value if isinstance(value, dict) else not_an_object(value, line, path.name)
        except ArrayFault as fault:
            if fault.too_long:
                raise _too_long(path.name, fault.line) from fault
            raise malformed(path.name, fault.line, fault.column, fault.reason) from fault
        except UnicodeDecodeError as error:
            raise malformed(path.name, line, 1, "a byte on this line or a later one is not UTF-8 text") from error


def _csv_lines(path: Path) -> _Lines:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a limit of the csv module itself; put back below
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=separator, strict=True)
            for value in reader:
                if None in value or None in value.values():
                    yield reader.line_num, _ragged(path.name, reader.line_num, reader.fieldnames or ())
                else:
                    yield reader.line_num, value
    except (csv.Error, UnicodeDecodeError) as error:
        raise malformed(path.name, reader.line_num + 1, 1, f"the CSV cannot be read ({error})") from error
    finally:
        csv.field_size_limit(before)


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
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield line, value
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            "QH-D04",
            f"The Parquet file cannot be read ({str(error).splitlines()[0]}).",
            where=f"{path.name}:{line + 1}:1",
            fix="Write the file again; it may be cut off.",
        ) from error


def missing_library(name: str, what: str) -> DataError:
    """The error when an optional library is not installed (QH-D51)."""
    return DataError(
        "QH-D51",
        f"Reading {what} needs the library {name}, which is not installed.",
        where="data.path",
        fix="Run: pip install 'qlora-hal[data]'",
    )


_READ: Mapping[str, Callable[[Path], _Lines]] = {
    "JSONL": _jsonl_lines,
    "JSON": _json_lines,
    "CSV": _csv_lines,
    "Parquet": _parquet_lines,
}
