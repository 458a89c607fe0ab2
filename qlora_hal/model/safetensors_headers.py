"""Headers of a model's weight files: the core's one strict check, with the errors of the model room.

The check itself is `qlora_hal.files.safetensors_file`; no tensor is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qlora_hal.errors import AdapterError, ModelError, QloraHalError, UnsafeInputError
from qlora_hal.files.opening import stored_path
from qlora_hal.files.safetensors_file import LENGTH_PREFIX_BYTES, TensorEntry, check_header, header_length
from qlora_hal.files.safetensors_file import read_header as read_checked_header

ReadRange = Callable[[int, int], bytes]
"""The bytes [begin, end) of a file."""


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `raw` is its JSON as stored, for fingerprints; offsets count from the start of the file, from
    which `read_range` reads."""

    path: Path
    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    read_range: ReadRange


def read_header(path: Path) -> Header:
    """Read and check one header.

    Raises UnsafeInputError QH-C15 or QH-C16 when it is malformed or too large, ModelError QH-C01 when the file is
    shorter than its header says, QH-C70 when it cannot be read, as no device can.
    """
    stored = path
    with _told_of(path):
        try:
            # The files of a hub snapshot are links into the cache, whose blobs carry hashes for names.
            stored = stored_path(path)
            checked = read_checked_header(stored)
        except OSError as error:
            raise ModelError(
                "QH-C70",
                f"{path.name} of the model cannot be read: {error.strerror or error}.",
                where=str(path),
                fix="Get the file again from the model's source.",
            ) from error
        except QloraHalError as error:
            error.message = error.message.replace(stored.name, path.name)
            raise
    with stored.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_PREFIX_BYTES), "little")
        return Header(path, file.read(length), checked.metadata, checked.tensors, partial(_read_file, path))


def read_header_by_ranges(path: Path, size: int, read_range: ReadRange, first_bytes: int) -> Header:
    """The same of a file of `size` bytes that lies elsewhere, in two reads where its header is longer than
    `first_bytes`; `path` is where it would lie here. Raises as `read_header`, and what `read_range` raises."""
    with _told_of(path):
        start = read_range(0, min(first_bytes, size))
        end = LENGTH_PREFIX_BYTES + header_length(start, size, path)
        if end > len(start):
            start += read_range(len(start), end)
        raw = start[LENGTH_PREFIX_BYTES:end]
        checked = check_header(raw, size, path)
    return Header(path, raw, checked.metadata, checked.tensors, read_range)


def read_tensor_bytes(header: Header, name: str, limit: int = 65536) -> bytes:
    """The bytes of one small tensor. Raises UnsafeInputError QH-C15 when it is larger than `limit`."""
    tensor = header.tensors[name]
    if tensor.byte_count > limit:
        raise malformed(header.path, f"a description of {tensor.byte_count} bytes, at most {limit} are expected")
    return header.read_range(tensor.begin, tensor.end)


def _read_file(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def malformed(path: Path, what: str) -> UnsafeInputError:
    """The error for weight files that break the rules; `what` completes the sentence `It has ...`."""
    return UnsafeInputError(
        "QH-C15",
        f"Malformed model file {path.name}: it has {what}.",
        where=str(path),
        cause="No library writes such files, and readers disagree on them.",
        fix="Get the file again from its source.",
    )


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """What is wrong with a header, told of a model's file: the check itself speaks of any safetensors file."""
    try:
        yield
    except (AdapterError, UnsafeInputError) as error:
        kind = ModelError if isinstance(error, AdapterError) else UnsafeInputError
        raise kind(
            error.code, error.message, where=str(path), cause=error.cause, fix=error.fix, context=error.context
        ) from error
