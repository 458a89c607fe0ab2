"""Tokenised rows on disk: one safetensors file, written as a stream and read through the memory map.

Neither side holds more than a chunk of tokens: the writer appends each tensor to its own part file and joins them under
one header at the end; the reader maps the file. What stays in memory is a few numbers a row.

The header holds two hashes: `sha256` of the tensors, and `header_sha256` of the header itself with that field as zeros.
They are made while the parts are joined, and verified by one pass when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil

from qlora_hal.contract.values import Int32
from qlora_hal.data.tokens.token_rows import Int64, TokenRows, UInt8, UInt64
from qlora_hal.errors import StorageError
from qlora_hal.files.durable import flush_folder, flush_to_medium, storage_error
from qlora_hal.files.opening import open_regular, refuse_link

_DTYPES: Mapping[str, tuple[str, type[np.generic]]] = {
    "tokens": ("I32", np.int32),
    "trained": ("U8", np.uint8),
    "offsets": ("I64", np.int64),
    "row_numbers": ("I64", np.int64),
    "counted": ("I32", np.int32),
    "digests": ("U64", np.uint64),
}
_ORDER = ("digests", "offsets", "row_numbers", "tokens", "counted", "trained")  # wide types first, so all are aligned
FORMAT = "qlora_hal tokens 1"
_OWN_HASH = "header_sha256"
_UNKNOWN = "0" * 64
_CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenStore:
    """Rows of token ids with the mask of what is trained; memory-mapped.

    `tokens` int32 and `trained` uint8 are `[all tokens]`; `starts` and `stops` `[rows]` cut a row out of them.
    `row_numbers` `[rows]` are source rows from 1, `counted` `[rows]` the trained tokens of a row, `digests` `[rows]`
    hashes of the rendered text. `sha256` is that of all tensors of the file.
    """

    tokens: Int32
    trained: UInt8
    starts: Int64
    stops: Int64
    row_numbers: Int64
    counted: Int32
    digests: UInt64
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Int64:
        """Tokens of each row."""
        return self.stops - self.starts

    @property
    def counted_tokens(self) -> int:
        """Tokens that carry loss, over all rows."""
        return int(self.counted.sum(dtype=np.int64))

    def row(self, index: int) -> tuple[Int32, UInt8]:
        """(ids, mask) of one row."""
        part = slice(int(self.starts[index]), int(self.stops[index]))
        return self.tokens[part], self.trained[part]

    def subset(self, indexes: Int64) -> TokenStore:
        """Only these rows, in this order; nothing is copied but their bounds."""
        return TokenStore(
            self.tokens,
            self.trained,
            self.starts[indexes],
            self.stops[indexes],
            self.row_numbers[indexes],
            self.counted[indexes],
            self.digests[indexes],
            self.sha256,
        )


class TokenWriter:
    """Appends rows to part files and joins them into one file that appears under its name whole or not at all."""

    def __init__(self, path: Path) -> None:
        refuse_link(path.parent)
        self._path = path
        self._staging = path.parent / f".staging-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._rows = self._tokens = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            self._staging.mkdir()
            self._parts: dict[str, IO[bytes]] = {
                name: (self._staging / name).open("wb", buffering=2**20) for name in _ORDER
            }
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._parts["offsets"].write(np.zeros(1, np.int64).tobytes())

    @property
    def rows(self) -> int:
        return self._rows

    def append(self, rows: TokenRows) -> None:
        """Add rows. Raises StorageError (QH-S09, QH-S11)."""
        if not len(rows.lengths):
            return
        bounds = np.concatenate([[0], np.cumsum(rows.lengths)])
        values: dict[str, npt.NDArray[Any]] = {
            "tokens": rows.ids,
            "trained": rows.trained,
            "offsets": bounds[1:] + self._tokens,
            "row_numbers": rows.numbers,
            "counted": np.add.reduceat(rows.trained, bounds[:-1], dtype=np.int32),
            "digests": rows.digests,
        }
        try:
            for name, value in values.items():
                self._parts[name].write(np.ascontiguousarray(value, _DTYPES[name][1]).data)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self._rows += len(rows.lengths)
        self._tokens += len(rows.ids)

    def finish(self, metadata: Mapping[str, str]) -> TokenStore:
        """Join the parts, hash, flush, put the file in its place and open it. Raises StorageError (QH-S09, QH-S11)."""
        digest = hashlib.sha256()
        try:
            whole = self._staging / "whole"
            with whole.open("wb") as out:
                out.write(self._header({**metadata, "sha256": _UNKNOWN}))
                for chunk in self._joined():
                    out.write(chunk)
                    digest.update(chunk)
                out.seek(0)
                out.write(self._header({**metadata, "sha256": digest.hexdigest()}))
                out.flush()
                flush_to_medium(out.fileno())
            os.replace(whole, self._path)
            flush_folder(self._path.parent)
            flush_folder(self._path.parent.parent)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        return open_store(self._path, verify=False)[0]  # of these very bytes

    def _joined(self) -> Iterator[bytes]:
        for name in _ORDER:
            self._parts[name].close()
            with (self._staging / name).open("rb") as part:
                while chunk := part.read(_CHUNK_BYTES):
                    yield chunk
            (self._staging / name).unlink()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        counts = {"tokens": self._tokens, "trained": self._tokens, "offsets": self._rows + 1}
        own: dict[str, str] = {"format": FORMAT, **metadata, _OWN_HASH: _UNKNOWN}
        entries: dict[str, object] = {"__metadata__": own}
        at = 0
        for name in _ORDER:
            kind, dtype = _DTYPES[name]
            count = counts.get(name, self._rows)
            end = at + count * np.dtype(dtype).itemsize
            entries[name] = {"dtype": kind, "shape": [count], "data_offsets": [at, end]}
            at = end
        own[_OWN_HASH] = hashlib.sha256(_encoded(entries)).hexdigest()
        text = _encoded(entries)
        return struct.pack("<Q", len(text)) + text

    def close(self) -> None:
        """Drop what was not finished."""
        for part in self._parts.values():
            with suppress(OSError):
                part.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class NotAStore(ValueError):
    """The file is not a token store that can be mapped."""


def open_store(path: Path, *, verify: bool = True) -> tuple[TokenStore, Mapping[str, str]]:
    """The rows of a file that `TokenWriter` wrote, and its metadata. Links are not followed; the map is of the very
    file that was verified. Raises NotAStore, also when its bytes are not those that were written, and OSError."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        entries, metadata, data_start = _read_header(stream, size)
        if verify:
            _verify(stream, metadata)
        arrays = {
            name: _mapped(stream, entries.get(name), kind, np.dtype(dtype), data_start, size)
            for name, (kind, dtype) in _DTYPES.items()
        }
    rows, tokens, offsets = len(arrays["row_numbers"]), len(arrays["tokens"]), np.array(arrays["offsets"])
    lengths = [len(arrays[name]) for name in ("trained", "counted", "digests", "offsets")]
    fits = lengths == [tokens, rows, rows, rows + 1] and offsets[0] == 0 and offsets[-1] == tokens
    if not fits or bool((np.diff(offsets) < 0).any()):
        raise NotAStore("its tensors do not fit together")
    store = TokenStore(
        arrays["tokens"],
        arrays["trained"],
        offsets[:-1],
        offsets[1:],
        np.array(arrays["row_numbers"]),
        np.array(arrays["counted"]),
        np.array(arrays["digests"]),
        metadata.get("sha256", ""),
    )
    return store, metadata


def _read_header(stream: BufferedReader, size: int) -> tuple[Mapping[str, Any], Mapping[str, str], int]:
    """Entries, metadata, and where the tensors begin, which is where the stream stands."""
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
    if length > min(MAX_HEADER_BYTES, size):
        raise NotAStore("its header is cut off")
    raw = stream.read(length)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise NotAStore("its header is not JSON") from error
    metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise NotAStore(f"it is not in the format {FORMAT!r}")
    if "sha256" not in metadata or _OWN_HASH not in metadata:
        raise NotAStore("an earlier release wrote it, without a hash")
    claimed = str(metadata[_OWN_HASH])
    if (
        hashlib.sha256(raw.replace(claimed.encode("utf-8", "surrogatepass"), _UNKNOWN.encode(), 1)).hexdigest()
        != claimed
    ):
        raise NotAStore("its header does not match its hash")
    del entries["__metadata__"]
    return entries, metadata, 8 + length


def _verify(stream: BufferedReader, metadata: Mapping[str, str]) -> None:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    if digest.hexdigest() != metadata["sha256"]:
        raise NotAStore("its tensors do not match their hash")


def _encoded(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, sort_keys=True).encode()
    return text + b" " * (-len(text) % 8)  # tensors then begin at a multiple of 8, as the format recommends


def _mapped(
    stream: BufferedReader, entry: object, kind: str, dtype: np.dtype[Any], data_start: int, size: int
) -> npt.NDArray[Any]:
    if not isinstance(entry, dict) or entry.get("dtype") != kind:
        raise NotAStore("a tensor is missing or has another type")
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    numbers = [*offsets, *shape] if isinstance(offsets, list) and isinstance(shape, list) else []
    if len(numbers) != 3 or not all(type(number) is int and number >= 0 for number in numbers):
        raise NotAStore("a tensor has no bounds")
    start, stop, count = numbers
    if stop - start != count * dtype.itemsize or data_start + stop > size:
        raise NotAStore("a tensor reaches beyond the file")
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(stream, dtype, "r", data_start + start, (count,))


def _sweep(folder: Path) -> None:
    """Remove what a process that is gone left behind; a killed preparation can leave gigabytes."""
    for left in folder.glob(".staging-*-*"):
        owner = left.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return storage_error(error, path, what="the token store")
