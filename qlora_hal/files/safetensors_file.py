"""safetensors files: an own check of the header before any reader trusts it, and numpy reading and writing.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors without gaps
(https://huggingface.co/docs/safetensors, "Format"). The format has no checksum and readers differ on malformed input
(duplicate keys, for one, load in the Rust reader), hence one strict check for every backend.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qlora_hal.errors import AdapterError, UnsafeInputError
from qlora_hal.files import strict_json
from qlora_hal.files.durable import Chunk
from qlora_hal.files.opening import open_regular

Array = npt.NDArray[Any]

LENGTH_PREFIX_BYTES = 8
MAX_HEADER_BYTES = 32 * 1024 * 1024
"""100 000 tensors with long names need about 20 MB; the reference reader's 100 MB can cost a gigabyte to parse."""
MAX_TENSORS = 100_000
"""Per file. Large sharded models hold about 2 000 per shard."""
_MAX_MARKS = {b"{": MAX_TENSORS + 1_000, b"[": 2 * MAX_TENSORS + 1_000, b",": 12 * MAX_TENSORS}
"""Structural characters that MAX_TENSORS entries may need; counted first, so that a bomb never becomes objects."""
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**63 - 1

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """What safetensors calls a dtype of NumPy, `I8` for `int8`; NumPy's own name where safetensors has none."""
    return _DTYPE_NAMES.get(dtype.newbyteorder("<").str, dtype.name)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header; `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def byte_count(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in file order, and the free-form metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """Contents of a file and the SHA-256 of exactly the bytes that were read."""

    arrays: Mapping[str, Array]
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str]
    sha256: str


def read_header(path: Path) -> Header:
    """Check a file's header against its size and return it.

    Refused: lengths over the limits, duplicate or ill-typed entries, unknown dtypes, overflowing shapes, offsets that
    overlap, leave holes or pass the end. Raises UnsafeInputError (QH-C15, QH-C16), AdapterError QH-C01 when truncated,
    and OSError.
    """
    with open_regular(path) as stream:
        return _checked_header(stream, path)[0]


def read_arrays(path: Path) -> TensorFile:
    """Read every tensor as a writable numpy array. BF16 becomes float32, which is exact.

    Raises UnsafeInputError as `read_header` does, AdapterError (QH-C11) for a dtype numpy does not have, OSError.
    """
    with open_regular(path) as stream:
        header, raw = _checked_header(stream, path)
        foreign = {name: t.dtype for name, t in header.tensors.items() if t.dtype not in (*_NUMPY_DTYPES, "BF16")}
        if foreign:
            name, dtype = next(iter(foreign.items()))
            raise AdapterError(
                "QH-C11",
                f"{len(foreign)} tensors have a dtype that cannot be read here, the first is {name} with {dtype}.",
                where=str(path),
                fix="Save the file in float32, float16 or bfloat16.",
                context={"tensors": foreign},
            )
        digest = hashlib.sha256(raw)
        arrays = {name: _read_tensor(stream, entry, digest, path) for name, entry in header.tensors.items()}
    dtypes = {name: entry.dtype for name, entry in header.tensors.items()}
    return TensorFile(arrays, header.metadata, dtypes, digest.hexdigest())


def file_chunks(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[Chunk]:
    """The bytes of a file holding `arrays`, equal for equal input: tensors by falling item size, then by name.

    The order is the reference writer's and keeps every tensor aligned. Raises KeyError for a dtype
    without a name (see `unstorable`).
    """
    ordered = {
        name: _little_endian(arrays[name]) for name in sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n))
    }
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, array in ordered.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for array in ordered.values():
        if array.nbytes:
            yield array.reshape(-1).view(np.uint8).data


def file_bytes(arrays: Mapping[str, Array]) -> int:
    """About how many bytes `file_chunks` gives: the tensors, and 160 bytes of header for each."""
    return sum(array.nbytes + 160 for array in arrays.values())


def unstorable(arrays: Mapping[str, Array]) -> list[str]:
    """Names and dtypes of the arrays that this format, as written here, has no dtype for."""
    return [f"{name} {a.dtype}" for name, a in arrays.items() if a.dtype.newbyteorder("<").str not in _DTYPE_NAMES]


def _little_endian(array: Array) -> Array:
    return np.require(array, dtype=array.dtype.newbyteorder("<"), requirements="C").reshape(array.shape)


def _read_tensor(stream: io.BufferedReader, entry: TensorEntry, digest: hashlib._Hash, path: Path) -> Array:
    # The checked header leaves no gaps, so tensors follow each other and one pass gives data and digest.
    dtype = "<u2" if entry.dtype == "BF16" else _NUMPY_DTYPES[entry.dtype]
    flat: Array = np.empty(math.prod(entry.shape), dtype="|u1" if entry.dtype == "BOOL" else dtype)
    view = flat.view(np.uint8).data
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            _refuse(path, "QH-C01", f"ends {len(view) - done} bytes early")
        done += count
    digest.update(view)
    if entry.dtype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    elif entry.dtype == "BOOL":
        flat = flat != 0
    return flat.reshape(entry.shape)


def header_length(start: bytes, size: int, path: Path) -> int:
    """Bytes of the JSON header that the first 8 bytes of a file of `size` bytes declare.

    Raises UnsafeInputError QH-C16 over the limit, AdapterError QH-C01 where the file is shorter than that.
    """
    if len(start) < LENGTH_PREFIX_BYTES:
        _refuse(path, "QH-C01", f"has {len(start)} bytes, at least 8 are expected")
    length = int(struct.unpack("<Q", start[:LENGTH_PREFIX_BYTES])[0])
    if length > MAX_HEADER_BYTES:
        _refuse(path, "QH-C16", f"declares a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if LENGTH_PREFIX_BYTES + length > size:
        _refuse(path, "QH-C01", f"has {size} bytes, its header alone needs {LENGTH_PREFIX_BYTES + length}")
    return length


def check_header(raw: bytes, size: int, path: Path) -> Header:
    """The checked header of a file of `size` bytes, from its JSON alone. Raises as `read_header` does."""
    for mark, limit in _MAX_MARKS.items():
        if (found := raw.count(mark)) > limit:
            _refuse(path, "QH-C16", f"has {found} '{mark.decode()}' in its header, {MAX_TENSORS} tensors are the limit")
    tensors, metadata = _entries(raw, path)
    return Header(_contiguous(tensors, LENGTH_PREFIX_BYTES + len(raw), size, path), metadata)


def _checked_header(stream: io.BufferedReader, path: Path) -> tuple[Header, bytes]:
    """The header and the raw bytes before the first tensor."""
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(LENGTH_PREFIX_BYTES)
    length = header_length(start, size, path)
    raw = stream.read(length)
    if len(raw) < length:
        _refuse(path, "QH-C01", "ends inside its header")
    return check_header(raw, size, path), start + raw


def _entries(raw: bytes, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if not raw.startswith(b"{"):
        _refuse(path, "QH-C15", "has a header that does not begin with '{'")
    try:
        # The header's own limit is larger than that of other JSON files.
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=strict_json.unique_keys)
    except (ValueError, RecursionError) as problem:
        _refuse(path, "QH-C15", f"has a header that is not strict JSON ({problem})", problem)
    # mx.save_safetensors writes null where there is no metadata; every adapter of mlx-lm has that.
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "QH-C15", "has __metadata__ that is not a table of strings")
    return {name: _entry(name, entry, path) for name, entry in parsed.items()}, metadata


def _entry(name: str, entry: object, path: Path) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, "QH-C15", f"describes {_short(name)} without exactly dtype, shape and data_offsets")
    if not name.isprintable():
        _refuse(path, "QH-C15", f"has the unprintable tensor name {_short(name)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(path, "QH-C15", f"gives {_short(name)} the unknown dtype {_short(str(dtype))}")
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        _refuse(path, "QH-C15", f"gives {_short(name)} an impossible shape")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, "QH-C15", f"gives {_short(name)} impossible offsets {_short(str(offsets))}")
    # A zero among the sizes must not hide an overflow of the others: readers in C multiply them in turn.
    if math.prod(max(n, 1) for n in shape) * DTYPE_BITS[dtype] > _MAX_ELEMENTS:
        _refuse(path, "QH-C15", f"gives {_short(name)} a shape that overflows 63 bits")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        _refuse(
            path,
            "QH-C15",
            f"gives {_short(name)} {offsets[1] - offsets[0]} bytes where {dtype} {list(shape)} needs {-(-bits // 8)}",
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _contiguous(tensors: dict[str, TensorEntry], start: int, size: int, path: Path) -> dict[str, TensorEntry]:
    """Entries in file order with absolute offsets, after checking that they tile the data exactly."""
    placed: dict[str, TensorEntry] = {}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            _refuse(path, "QH-C15", f"has {_short(name)}, which {kind}")
        position = entry.end
        placed[name] = TensorEntry(entry.dtype, entry.shape, start + entry.begin, start + entry.end)
    if start + position > size:
        _refuse(path, "QH-C01", f"has {size} bytes, its header promises {start + position}")
    if start + position < size:
        _refuse(path, "QH-C15", f"has {size - start - position} bytes after its last tensor")
    return placed


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in value)


def _short(text: str) -> str:
    # ascii() keeps control characters of a hostile name out of the terminal.
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _refuse(path: Path, code: str, problem: str, cause: BaseException | None = None) -> NoReturn:
    if code == "QH-C01":
        raise AdapterError(
            code,
            f"Truncated safetensors file: {path.name} {problem}.",
            where=str(path),
            cause="A copy, download or save stopped early.",
            fix="Fetch or save the file again.",
        ) from cause
    raise UnsafeInputError(
        code,
        f"Malformed safetensors file: {path.name} {problem}.",
        where=str(path),
        cause="No writer makes such a file, readers disagree on it, and it may be hostile.",
        fix="Fetch or save the file again, and compare its hash with its source's.",
    ) from cause
