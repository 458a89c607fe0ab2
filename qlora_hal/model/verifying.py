"""Every byte of a model's files, hashed: what the fingerprint, which takes samples, cannot promise."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_hal.errors import CheckpointError, ModelError, figures
from qlora_hal.files import durable
from qlora_hal.files.opening import stored_path
from qlora_hal.model.weight_files import INDEX_FILE, read_headers

_THREADS = 4
"""Hashing leaves Python's lock; more would only wait for the disk."""
_IDLE_KEYS = frozenset({"_name_or_path", "transformers_version"})
"""Keys of config.json that say where it was saved, and by what."""


def model_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of config.json, the weight files and their index, each read once. A hub snapshot's links are
    followed. Raises ModelError QH-C70 for a file that cannot be read, and as `read_headers`."""
    return {name: digest for name, digest, _ in _hashed(folder)}


def verify_model(folder: Path, recorded: Mapping[str, object], tell: Callable[[str], None]) -> dict[str, str]:
    """Hash the model and compare it with what was `recorded` when the run began (empty: nothing was), with a note.

    Raises CheckpointError QH-E15 naming the files that differ, and as `model_hashes`.
    """
    started = time.perf_counter()
    found = _hashed(folder)
    hashes = {name: digest for name, digest, _ in found}
    took = figures.duration(time.perf_counter() - started)
    size = figures.size(sum(size for _, _, size in found))
    if not recorded:
        tell(f"hashed {len(found)} files of the model, {size}, in {took}; each resume compares them")
        return hashes
    changed = sorted(name for name in {*hashes, *recorded} if hashes.get(name) != recorded.get(name))
    if changed:
        raise CheckpointError(
            "QH-E15",
            f"{len(changed)} of {len(found)} files of the model are not those that the run began with: "
            f"{', '.join(changed[:5])}.",
            where=str(folder),
            cause="A bit changed on the disk, or the model was replaced; the fingerprint, which samples, may miss it.",
            fix="Get these files again from the model's source, or restore them, and resume.",
            context={"files": changed},
        )
    tell(f"verified {len(found)} files of the model, {size}, in {took}: they are those that the run began with")
    return hashes


def base_config_hash(config: Mapping[str, object]) -> str:
    """SHA-256 of a config.json by its content: the fingerprint is of the weight files alone."""
    kept = {key: value for key, value in config.items() if key not in _IDLE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _hashed(folder: Path) -> list[tuple[str, str, int]]:
    paths = [folder / "config.json", *(header.path for header in read_headers(folder))]
    if len(paths) > 2 and (folder / INDEX_FILE).is_file():
        paths.append(folder / INDEX_FILE)
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as threads:
        written = list(threads.map(_hash_of, paths))
    return sorted((path.name, file.sha256, file.size) for path, file in zip(paths, written, strict=True))


def _hash_of(path: Path) -> durable.WrittenFile:
    try:
        return durable.hashed(stored_path(path))
    except OSError as problem:
        raise ModelError(
            "QH-C70",
            f"{path.name} of the model cannot be read: {problem.strerror or problem}.",
            where=str(path),
            fix="Get the file again from the model's source.",
        ) from problem
