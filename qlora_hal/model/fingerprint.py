"""A fingerprint of weights that does not read all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_hal.files.safetensors_file import LENGTH_PREFIX_BYTES
from qlora_hal.model.safetensors_headers import Header

if TYPE_CHECKING:
    from qlora_hal.model.facts import TensorFacts

WINDOWS = 64
WINDOW_BYTES = 64 * 1024


def fingerprint(headers: Sequence[Header]) -> str:
    """SHA-256, in hex, over every header and 64 windows of 64 KiB of each file's data, evenly spread.

    Files up to 4 MiB of data are read whole. Folder and file names do not count; other weights in equal shapes do.
    Not a proof of integrity: a changed bit between two windows goes unseen.
    """
    digest = hashlib.sha256()
    for header in sorted(headers, key=lambda h: h.path.name):
        start = LENGTH_PREFIX_BYTES + len(header.raw)
        end = max((tensor.end for tensor in header.tensors.values()), default=start)
        digest.update(len(header.raw).to_bytes(8, "little"))
        digest.update(header.raw)
        for offset, length in windows(start, end):
            digest.update(header.read_range(offset, offset + length))
    return digest.hexdigest()


def coverage(tensors: Mapping[str, TensorFacts]) -> str:
    """What of the weights the fingerprint reads, in words."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.file] += tensor.byte_count
    covered = sum(min(size, WINDOWS * WINDOW_BYTES) for size in sizes.values())
    if covered == sizes.total():
        return "every byte of the weight files"
    share = f"{covered} of {sizes.total()} bytes in {len(sizes)} weight files"
    return f"the headers and {WINDOWS} windows of {WINDOW_BYTES // 1024} KiB of each file: {share}"


def windows(start: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the samples of the bytes [start, end); the first and the last byte are always covered."""
    size = end - start
    if size <= WINDOWS * WINDOW_BYTES:
        return [(start, size)]
    last = size - WINDOW_BYTES
    return [(start + last * i // (WINDOWS - 1), WINDOW_BYTES) for i in range(WINDOWS)]
