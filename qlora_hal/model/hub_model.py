"""A model of the hub in three parts, each fetched when it is needed: its description, its tokenizer, its weights.

What a run will be is known from the description (config.json, the index, and the headers of the weight files, which are
read in place), what it trains on from the tokenizer. The weights, by far the most, come last.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath

from qlora_hal.model import hub
from qlora_hal.model.described_weights import agreed_header
from qlora_hal.model.hub import Repository, Unreachable
from qlora_hal.model.other_folders import gguf_only
from qlora_hal.model.safetensors_headers import Header, read_header_by_ranges
from qlora_hal.model.safety import PICKLE_SUFFIXES, refuse_pickle_only
from qlora_hal.model.weight_files import INDEX_FILE, checked_headers, read_json, read_weight_map, weight_files

_DESCRIPTION = (
    "config.json", "generation_config.json", "quantize_config.json", "quant_config.json", INDEX_FILE,
    "adapter_config.json",
)  # fmt: skip
_SMALL_FILES = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Configuration, tokenizer files, chat templates and terms of use; nothing that runs. Of the weights only what the
index names is fetched: pickles, exports to other formats and second copies (`consolidated.safetensors`) never are."""
_TEMPLATES = "additional_chat_templates/*.jinja"
"""The one subfolder that is read."""
_WEIGHTS = frozenset({".safetensors", ".gguf", *PICKLE_SUFFIXES})
_CODE = "*.py"
"""Fetched only with trust_remote_code and a pinned commit."""
_FIRST_BYTES = 16 * 1024
"""Of each weight file; the headers of most shards are shorter (about 110 bytes a tensor), others take a second read."""
_READERS = 8


@dataclass(frozen=True, slots=True)
class RemoteWeights:
    """Weight files of a repository of which the cache does not have all."""

    repository: Repository
    files: tuple[str, ...]

    @property
    def missing_bytes(self) -> int:
        """Bytes of the files that are still to be fetched."""
        return sum(self.repository.sizes[name] or 0 for name in self.repository.missing(self.files))


@dataclass(frozen=True, slots=True)
class HubModel:
    """The folder of a commit in the cache. `weights` and their checked `headers` are set while they lie on the hub;
    `from_config` where the headers are what config.json describes, held against names and sizes alone."""

    folder: Path
    commit: str
    weights: RemoteWeights | None = None
    headers: tuple[Header, ...] | None = None
    from_config: bool = False


def planned(
    name: str, *, revision: str | None, trust_remote_code: bool, tokenizer: bool, config_is_enough: bool = False
) -> HubModel:
    """A model without its weights, where the cache does not have them already; without its `tokenizer` where nobody
    asks for it. When the hub cannot be reached, the cache's copy, whole.

    Raises HubError QH-E11 when there is none, QH-E12 when the model or revision is missing, private or gated, QH-E13
    when a file stays incomplete; UnsafeInputError QH-C17 for pickle-only models; and as `weight_files` and
    `checked_headers`.
    """
    if hub.is_offline():
        return _whole_copy(name, revision, "HF_HUB_OFFLINE is set")
    try:
        repository = hub.look_up(name, revision)
        refuse_pickle_only(repository.sizes, where=name, on_hub=True)
        hub.fetch(repository, _wanted(repository, tokenizer=tokenizer, code=trust_remote_code))
        return _described(repository, config_is_enough=config_is_enough)
    except Unreachable as failure:
        return _whole_copy(name, revision, failure.reason, failure)


def fetch_weights(weights: RemoteWeights, *, progress: bool) -> None:
    """Bring the weights into the cache, those files that it has not yet. Raises HubError (QH-E11, QH-E12, QH-E13) and
    StorageError QH-E22."""
    try:
        hub.fetch(weights.repository, weights.files, progress=progress)
    except Unreachable as failure:
        raise hub.not_cached(weights.repository.name, failure.reason, "not all of its weights") from failure


def _wanted(repository: Repository, *, tokenizer: bool, code: bool) -> list[str]:
    """Files to fetch at once, all of them small."""
    patterns = (*_DESCRIPTION, *(_SMALL_FILES if tokenizer else ()), *((_CODE,) if code else ()))
    return [
        name
        for name in repository.sizes
        if ("/" not in name and _is_one_of(name, patterns)) or (tokenizer and fnmatchcase(name, _TEMPLATES))
    ]


def _is_one_of(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _described(repository: Repository, *, config_is_enough: bool) -> HubModel:
    folder = repository.folder()
    if not (folder / "config.json").is_file():
        if gguf := gguf_only(Path(repository.name), repository.sizes):
            raise gguf
        return HubModel(folder, repository.commit)  # no model; what it is instead is told from the folder
    weights = RemoteWeights(repository, weight_files(folder, repository.sizes))
    if not repository.missing(weights.files):
        return HubModel(folder, repository.commit)
    if config_is_enough and (header := _agreed(repository, folder, weights.files)) is not None:
        return HubModel(folder, repository.commit, weights, (header,), from_config=True)
    with ThreadPoolExecutor(_READERS) as readers:
        headers = list(readers.map(partial(_header, repository), weights.files))
    return HubModel(folder, repository.commit, weights, checked_headers(folder, headers))


def _agreed(repository: Repository, folder: Path, files: Collection[str]) -> Header | None:
    """What config.json describes, where the index and the sizes that the hub tells say the same."""
    sizes = [size for name in files if (size := repository.sizes[name]) is not None]
    if len(sizes) < len(files):
        return None
    index = folder / INDEX_FILE
    named = read_weight_map(index, files) if len(files) > 1 and index.is_file() else {}
    return agreed_header(read_json(folder / "config.json"), folder, named, sizes)


def _header(repository: Repository, name: str) -> Header:
    size = repository.sizes[name]
    if size is None:
        raise Unreachable(f"the hub does not tell the size of {name}")
    return read_header_by_ranges(repository.folder() / name, size, partial(_part, repository, name), _FIRST_BYTES)


def _part(repository: Repository, name: str, begin: int, end: int) -> bytes:
    try:
        return hub.read_range(repository, name, begin, end)
    except Unreachable as failure:
        raise hub.not_cached(repository.name, failure.reason, "its description, without its weights") from failure


def _whole_copy(name: str, revision: str | None, reason: str, cause: Exception | None = None) -> HubModel:
    folder = hub.cached(name, revision, reason, cause)
    present = [PurePath(path.name) for path in folder.iterdir() if path.is_file()]
    if not any(file.suffix in _WEIGHTS for file in present):
        raise hub.not_cached(name, reason, "its description, without its weights") from cause
    return HubModel(folder, folder.name)
