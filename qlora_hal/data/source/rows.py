"""A row, a source of rows, and what tells one source from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from qlora_hal.data.source.row_errors import field_fault
from qlora_hal.data.source.row_files import malformed, not_an_object
from qlora_hal.errors import DataError
from qlora_hal.files.strict_json import JsonProblem, refuse_depth


class Row(NamedTuple):
    """One row of a source. `number` counts rows from 1 over all files; `line` is the line (or row) in `file`.

    `columns` says which of the user's columns stand under which names of `value`, where they were given others; `part`
    which of several sources the row is of, from 0.
    """

    number: int
    file: str
    line: int
    value: Mapping[str, object] | DataError
    columns: Mapping[str, str] = MappingProxyType({})
    part: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Source:
    """Rows with a name and an identity. `digest` is a SHA-256 of the contents; `rows` may be called again;
    `notes` are for the report, `alerts` also for the user at once; `parts` are the names of several sources in one;
    `files` are those on this disk that all rows of are read."""

    name: str
    kind: str
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    stamp: Callable[[], object] = lambda: None
    notes: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def memory_source(rows: Sequence[Mapping[str, object]]) -> Source:
    """Rows that are already in memory, as given to `train(data=[...])`."""

    def read() -> Iterator[Row]:
        for number, value in enumerate(rows, start=1):
            yield Row(number, "data", number, _of_known_types(value, number))

    return Source("rows in memory", "memory", read, lambda: digest_of_values(rows))


def _of_known_types(value: object, number: int) -> Mapping[str, object] | DataError:
    """The row, or the error that it is: no object, or with a column that no file of rows could hold."""
    if not isinstance(value, Mapping):
        return not_an_object(value, number)
    for name, held in value.items():
        if not (held is None or isinstance(held, str | int | float | list | tuple | Mapping)):
            return field_fault(
                Row(number, "data", number, value), str(name), held, "text, a number, a list or an object"
            )
    try:
        refuse_depth(value)
    except JsonProblem as problem:
        return malformed("data", number, 1, str(problem))
    return value


def digest_of_values(values: Iterable[object]) -> str:
    """SHA-256 over rows in their JSON form."""
    digest = hashlib.sha256()
    for value in values:
        try:
            text = json.dumps(value, sort_keys=True, default=repr)
        except TypeError:  # keys of several types, which have no order
            text = repr(value)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes and sizes of files, in order; names do not count."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
