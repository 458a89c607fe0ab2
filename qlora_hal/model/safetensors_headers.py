"""Headers of a model's weight files: the core's one strict check, with the errors of the model room.

The check itself is `qlora_hal.files.safetensors_file`; no tensor is loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.errors import AdapterError, ModelError, QloraHalError, UnsafeInputError
from qlora_hal.files.opening import stored_path
from qlora_hal.files.safetensors_file import TensorEntry
from qlora_hal.files.safetensors_file import read_header as read_checked_header

LENGTH_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `raw` is its JSON as stored, for fingerprints; offsets count from the start of the file."""

    path: Path
    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read and check one header.

    Raises UnsafeInputError QH-C15 or QH-C16 when it is malformed or too large, ModelError QH-C01 when the file is
    shorter than its header says, QH-C70 when it cannot be read, as no device can.
    """
    stored = path
    try:
        # The files of a hub snapshot are links into the cache, whose blobs carry hashes for names.
        stored = stored_path(path)
        checked = read_checked_header(stored)
    except AdapterError as error:
        raise _told_of(path, stored, error, ModelError) from error
    except UnsafeInputError as error:
        raise _told_of(path, stored, error, UnsafeInputError) from error
    except OSError as error:
        raise ModelError(
            "QH-C70",
            f"{path.name} of the model cannot be read: {error.strerror or error}.",
            where=str(path),
            fix="Get the file again from the model's source.",
        ) from error
    with stored.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_PREFIX_BYTES), "little")
        return Header(path, file.read(length), checked.metadata, checked.tensors)


def read_tensor_bytes(path: Path, tensor: TensorEntry, limit: int = 65536) -> bytes:
    """The bytes of one small tensor. Raises UnsafeInputError QH-C15 when it is larger than `limit`."""
    if tensor.byte_count > limit:
        raise malformed(path, f"a description of {tensor.byte_count} bytes, at most {limit} are expected")
    with path.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.byte_count)


def malformed(path: Path, what: str) -> UnsafeInputError:
    """The error for weight files that break the rules; `what` completes the sentence `It has ...`."""
    return UnsafeInputError(
        "QH-C15",
        f"Malformed model file {path.name}: it has {what}.",
        where=str(path),
        cause="No library writes such files, and readers disagree on them.",
        fix="Get the file again from its source.",
    )


def _told_of(path: Path, stored: Path, error: QloraHalError, kind: type[QloraHalError]) -> QloraHalError:
    message = error.message.replace(stored.name, path.name)
    return kind(error.code, message, where=str(path), cause=error.cause, fix=error.fix, context=error.context)
