"""MANIFEST.json: what a checkpoint holds, down to the hash of each file. A folder without a valid one is no checkpoint.

safetensors files load without a word after a flipped bit or a tail of zeros, so the hashes decide. The manifest also
hashes itself: its own fields (step, block size, fingerprints) steer a resume.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.files import strict_json
from qlora_hal.files.durable import WrittenFile, hashed
from qlora_hal.files.opening import open_regular

MANIFEST_FILE = "MANIFEST.json"
SCHEMA_VERSION = 1
REQUIRED_FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json")

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenCheckpoint(Exception):
    """One checkpoint fails verification; the text names the file, what was expected and what was found."""


class ForeignSchema(Exception):
    """The manifest is of a schema this version does not know; the checkpoint may be perfectly sound."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest: files by name, and the summary fields as written."""

    step: int
    files: Mapping[str, WrittenFile]
    summary: Mapping[str, object]


def encode_manifest(step: int, files: Mapping[str, WrittenFile], summary: Mapping[str, object]) -> bytes:
    """The bytes of a manifest. Raises JsonProblem when the summary cannot be written as JSON."""
    content: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()},
        "summary": dict(summary),
    }
    return strict_json.encode({**content, "manifest_sha256": _own_hash(content)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, its own hash checked. Raises BrokenCheckpoint, ForeignSchema."""
    try:
        with open_regular(folder / MANIFEST_FILE) as stream:
            raw = stream.read(strict_json.MAX_JSON_BYTES + 1)
        content = strict_json.decode_object(raw)
        canonical = strict_json.encode(content)
    except FileNotFoundError as problem:
        raise BrokenCheckpoint(f"{MANIFEST_FILE} is missing, so the save never finished") from problem
    except (OSError, strict_json.JsonProblem) as problem:
        raise BrokenCheckpoint(f"{MANIFEST_FILE} cannot be read ({problem})") from problem
    version = content.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        raise ForeignSchema(f"{MANIFEST_FILE} has schema version {version}, this version reads {SCHEMA_VERSION}")
    claimed = content.pop("manifest_sha256", None)
    if raw != canonical or claimed != _own_hash(content):
        raise BrokenCheckpoint(f"{MANIFEST_FILE} does not match its own hash")
    step, files, summary = content.get("step"), content.get("files"), content.get("summary")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(summary, dict):
        raise BrokenCheckpoint(f"{MANIFEST_FILE} has no step, files or summary")
    listed = {name: _listed_file(name, entry) for name, entry in files.items()}
    missing = [name for name in REQUIRED_FILES if name not in listed]
    if missing:
        raise BrokenCheckpoint(f"{MANIFEST_FILE} does not list {', '.join(missing)}")
    return Manifest(step, listed, summary)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise BrokenCheckpoint unless every listed file is there, ordinary, and of the listed size."""
    problems = []
    for name, expected in manifest.files.items():
        try:
            with open_regular(folder / name) as stream:
                size = stream.seek(0, 2)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as problem:
            problems.append(f"{name} cannot be read ({problem.strerror or problem})")
        else:
            if size != expected.size:
                problems.append(f"{name} has {size} bytes, {expected.size} were written")
    if problems:
        raise BrokenCheckpoint("; ".join(problems))


def check_hashes(folder: Path, manifest: Manifest, *, apart_from: Collection[str] = ()) -> None:
    """Raise BrokenCheckpoint unless every listed file has its size and, but for those in `apart_from`, its content."""
    check_sizes(folder, manifest)
    problems = []
    for name, expected in manifest.files.items():
        if name in apart_from:
            continue
        try:
            if file_sha256(folder / name) != expected.sha256:
                problems.append(f"{name} does not match its hash, its content changed after it was written")
        except OSError as problem:
            problems.append(f"{name} cannot be read ({problem.strerror or problem})")
    if problems:
        raise BrokenCheckpoint("; ".join(problems))


def is_sound(folder: Path) -> bool:
    """Whether every byte verifies; one of another schema counts as sound, because nothing shows that it is not."""
    try:
        check_hashes(folder, read_manifest(folder))
    except ForeignSchema:
        return True
    except BrokenCheckpoint:
        return False
    return True


def is_complete(folder: Path) -> bool:
    """Whether manifest and sizes fit, without reading the tensors: gigabytes at each save would cost too much."""
    try:
        check_sizes(folder, read_manifest(folder))
    except (BrokenCheckpoint, ForeignSchema):
        return False
    return True


def file_sha256(path: Path) -> str:
    """SHA-256 of an ordinary file, in hexadecimal. Raises OSError."""
    return hashed(path).sha256


def _listed_file(name: str, entry: object) -> WrittenFile:
    size = entry.get("size") if isinstance(entry, dict) else None
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    # A name with a separator would let a manifest point outside its folder.
    if not _FILE_NAME.fullmatch(name) or type(size) is not int or size < 0:
        raise BrokenCheckpoint(f"{MANIFEST_FILE} lists the impossible file {name[:80]!a}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise BrokenCheckpoint(f"{MANIFEST_FILE} lists {name} without a SHA-256")
    return WrittenFile(size, sha256)


def _own_hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(strict_json.encode(content)).hexdigest()
