"""A model's tensors into safetensors files of at most 5 GB, each tensor made, written and dropped."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qlora_hal.files import durable, strict_json
from qlora_hal.files.durable import Chunk
from qlora_hal.model.weight_files import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000
HEADER_BYTES_PER_TENSOR = 200

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor before it is made; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    byte_count: int


Planned = TypeVar("Planned", bound=PlannedTensor)


def total_bytes(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes of the tensors, and about those of their headers."""
    return sum(tensor.byte_count + HEADER_BYTES_PER_TENSOR for tensor in tensors)


def write_shards(
    folder: Path,
    tensors: Sequence[Planned],
    value: Callable[[Planned], Array],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write all tensors and, for more than one file, their index; returns file name -> SHA-256.

    A tensor larger than `shard_bytes` has a file of its own. Raises OSError.
    """
    shards = _split(tensors, shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else _shard_names(len(shards))
    written = {
        name: durable.write_new(folder / name, _file_chunks(shard, value)).sha256
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(tensor.byte_count for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        durable.write_new(folder / INDEX_FILE, [strict_json.encode(index)])
    return written


def _split(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.byte_count > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.byte_count
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _file_chunks(tensors: Sequence[Planned], value: Callable[[Planned], Array]) -> Iterator[Chunk]:
    """The header, then the tensors as they are made; wide dtypes first where the given order would misalign one."""
    ordered = tensors if _is_aligned(tensors) else sorted(tensors, key=lambda tensor: -_item_bytes(tensor))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.byte_count
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for tensor in ordered:
        flat = np.ascontiguousarray(value(tensor)).reshape(-1)
        if flat.nbytes != tensor.byte_count:
            raise AssertionError(f"{tensor.name} has {flat.nbytes} bytes, {tensor.byte_count} were planned")
        if flat.nbytes:
            yield flat.view(np.uint8).data


def _is_aligned(tensors: Sequence[PlannedTensor]) -> bool:
    begin = 0
    for tensor in tensors:
        if begin % max(_item_bytes(tensor), 1):
            return False
        begin += tensor.byte_count
    return True


def _item_bytes(tensor: PlannedTensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return tensor.byte_count // count if count else 0
