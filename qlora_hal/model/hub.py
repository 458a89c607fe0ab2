"""The Hugging Face hub: what a repository holds, whole files of it, parts of a file; retried, checked for size, or a
clear error. Which files of a model are wanted, and when, is decided in `hub_model`.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import ModelInfo, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, tqdm, validate_repo_id

from qlora_hal.errors import HubError, StorageError, figures
from qlora_hal.files.durable import free_bytes
from qlora_hal.files.refused_paths import expanded

LOGIN = "hf auth login"
_CHUNK = 64 * 1024
LARGEST_LISTING = 2**26
"""Bytes of the hub's answer on one repository: some 200 for each of its files."""
LARGEST_REFUSAL = 2**20
ANSWERED_WITHIN = 600.0
"""Seconds for a listing, or for the headers of one weight file, which are megabytes."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how patiently a passing failure is tried again."""

    attempts: int = 4
    first_delay_seconds: float = 1.0
    longest_delay_seconds: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def pause(self, attempt: int, asked_seconds: float | None) -> None:
        """Wait after the failed `attempt`, counted from 0: doubling delays, or what the server asked for."""
        delay = self.first_delay_seconds * 2**attempt if asked_seconds is None else asked_seconds
        self.sleep(min(delay, self.longest_delay_seconds))


@dataclass(frozen=True, slots=True)
class Repository:
    """A model of the hub at one commit: `revision` is what was asked for, `sizes` its files with their bytes, None
    where the hub does not tell them."""

    name: str
    revision: str | None
    commit: str
    sizes: Mapping[str, int | None]

    def folder(self) -> Path:
        """Where the cache has this commit, whether it lies there or not."""
        return _cache_of(self.name) / "snapshots" / self.commit

    def missing(self, names: Collection[str]) -> tuple[str, ...]:
        """Which of these files the cache lacks, or has in another size."""
        return tuple(name for name in names if not self._is_here(name))

    def _is_here(self, name: str) -> bool:
        file, expected = self.folder() / name, self.sizes.get(name)
        return file.is_file() and expected in (None, file.stat().st_size)


NOT_OF_A_HUB = (ValueError, TypeError, KeyError, AttributeError)
"""What huggingface_hub raises over an answer that is not in the hub's form: the page of a proxy or of a login."""


class Unreachable(Exception):
    """The hub did not answer, or not in a usable way, at any attempt; another time it may."""

    def __init__(self, reason: str, asked_seconds: float | None = None, incomplete_file: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.asked_seconds = asked_seconds
        self.incomplete_file = incomplete_file


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    return bool(constants.HF_HUB_OFFLINE)


def look_up(name: str, revision: str | None, retries: Retries | None = None) -> Repository:
    """What the hub has under this name, in one request. Raises Unreachable, and HubError QH-E12 when the model or the
    revision is missing, private or gated."""

    validate_repo_id(name)
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    url = f"{constants.ENDPOINT}/api/models/{name}{at}?blobs=true"

    def asked() -> Repository:
        # As HfApi.model_info does it, which reads an answer of any size into memory.
        with _hub_errors(name, revision), _streamed(url, build_hf_headers()) as (_, chunks):
            info: Any = ModelInfo(**json.loads(whole(chunks, LARGEST_LISTING)))  # type: ignore[no-untyped-call]
        return Repository(name, revision, info.sha or "", {file.rfilename: file.size for file in info.siblings or ()})

    return _with_retries(asked, retries or Retries())


def fetch(
    repository: Repository, names: Collection[str], *, progress: bool = False, retries: Retries | None = None
) -> Path:
    """Bring these files into the cache, as far as they are not there, and give the folder; a partial file never gets
    further. `progress` shows a bar where standard error is a terminal.

    Raises Unreachable, HubError (QH-E12, QH-E13 for a file that stays incomplete), StorageError QH-E22.
    """
    require_space(repository, names)
    retries = retries or Retries()
    # By the name that was asked for: the cache then finds the commit under that name without the hub.
    patterns = [glob.escape(name) for name in names]

    def fetched() -> Path:
        with _hub_errors(repository.name, repository.revision), _space_told(repository, names):
            return Path(
                snapshot_download(
                    repository.name,
                    revision=repository.revision,
                    allow_patterns=patterns,
                    tqdm_class=None if progress and sys.stderr.isatty() else _Unseen,
                )
            )

    try:
        folder = _with_retries(fetched, retries)
        if folder.name != repository.commit:
            raise Unreachable(f"{repository.name} was changed on the hub while it was read")
        _complete(repository, names, retries)
    except Unreachable as failure:
        if failure.incomplete_file:
            raise _incomplete(repository.name, failure.incomplete_file) from failure
        raise
    return folder


def read_range(repository: Repository, name: str, begin: int, end: int, retries: Retries | None = None) -> bytes:
    """The bytes [begin, end) of a file, of which no more is fetched. Raises Unreachable and HubError QH-E12."""
    url = hf_hub_url(repository.name, name, revision=repository.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}

    def asked() -> bytes:
        part = bytearray()
        with _hub_errors(repository.name, repository.commit), _streamed(url, headers) as (status, streamed):
            chunks = in_time(streamed)
            # A server that knows no ranges answers 200 and sends the whole file: gigabytes, of which no more is read
            # than is wanted, and nothing else is kept.
            position = begin if status == 206 else 0
            for chunk in chunks:
                part += chunk[max(begin - position, 0) : max(end - position, 0)]
                position += len(chunk)
                if position >= end:
                    break
        if len(part) != end - begin:
            raise Unreachable(f"the hub gave {len(part)} of {end - begin} bytes of {name}")
        return bytes(part)

    return _with_retries(asked, retries or Retries())


def cached(name: str, revision: str | None, reason: str, cause: Exception | None = None) -> Path:
    """The folder of a model that the cache has; `reason` is why the hub is not asked. Raises HubError QH-E11."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    except LocalEntryNotFoundError as error:
        partly = type(error).__name__ == "IncompleteSnapshotError"  # huggingface_hub 0 has no such class
        raise not_cached(name, reason, "only a part of it" if partly else "no copy") from (cause or error)


def not_cached(name: str, reason: str, held: str) -> HubError:
    """The error for a model that can neither be fetched nor taken from the cache, which has `held` (QH-E11)."""
    return HubError(
        "QH-E11",
        f"The model {name} cannot be fetched, and this machine's cache has {held}.",
        where=name,
        cause=f"{reason}.",
        fix="Check the network, the proxy and HF_HUB_OFFLINE, or copy the model's folder here and give its path.",
        context={"repository": name},
    )


def require_space(repository: Repository, names: Collection[str]) -> None:
    """Refuse a download that the disk of the cache cannot hold. Raises StorageError QH-E22 with both figures."""
    cache = _cache_of(repository.name)
    needed = sum(repository.sizes[name] or 0 for name in repository.missing(names))
    free = free_bytes(cache)
    if free is not None and needed > free:
        raise _no_space(repository, needed, free)


class _Unseen(tqdm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


@contextmanager
def _streamed(url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Status and body of an answer, read as it comes. huggingface_hub 0 asks by requests, later releases by httpx."""
    session: Any = get_session()
    wanted = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    by_httpx = hasattr(session, "stream") and callable(session.stream)
    with session.stream("GET", url, **wanted) if by_httpx else session.get(url, stream=True, **wanted) as answer:
        hf_raise_for_status(_with_beginning(answer) if answer.status_code >= 400 and by_httpx else answer)
        yield answer.status_code, answer.iter_bytes() if by_httpx else answer.iter_content(_CHUNK)


def _with_beginning(answer: Any) -> Any:
    """A failed answer of httpx with as much of its body as what went wrong may stand in."""
    body = bytearray()
    for chunk in in_time(answer.iter_bytes()):
        body += chunk
        if len(body) >= LARGEST_REFUSAL:
            break
    encoded = {"content-encoding", "content-length", "transfer-encoding"}
    headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() not in encoded]
    content = bytes(body[:LARGEST_REFUSAL])
    return type(answer)(answer.status_code, headers=headers, content=content, request=answer.request)


def whole(chunks: Iterable[bytes], most: int) -> bytes:
    """A body that ends, within `most` bytes and ANSWERED_WITHIN. Raises Unreachable."""
    body = bytearray()
    for chunk in in_time(chunks):
        body += chunk
        if len(body) > most:
            raise Unreachable(f"the answer of {constants.ENDPOINT} is longer than {figures.size(most)}")
    return bytes(body)


def in_time(chunks: Iterable[bytes], clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """The chunks until the seconds of ANSWERED_WITHIN are over: the library's own patience is with each read alone.
    Raises Unreachable."""
    end = clock() + ANSWERED_WITHIN
    for chunk in chunks:
        if clock() > end:
            raise Unreachable(f"the answer of {constants.ENDPOINT} did not end within {ANSWERED_WITHIN:.0f} s")
        yield chunk


def _with_retries(call: Callable[[], _Result], retries: Retries) -> _Result:
    for attempt in range(retries.attempts):
        try:
            return call()
        except Unreachable as failure:
            if attempt + 1 == retries.attempts:
                raise
            retries.pause(attempt, failure.asked_seconds)
    raise AssertionError("at least one attempt is made")


def _cache_of(name: str) -> Path:
    return expanded(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _complete(repository: Repository, names: Collection[str], retries: Retries) -> None:
    """Fetch again what lies in the cache with another size than the hub has."""

    def fetch_again(name: str) -> None:
        with _hub_errors(repository.name, repository.commit), _space_told(repository, names):
            hf_hub_download(repository.name, name, revision=repository.commit, force_download=True)
        if repository.missing([name]):
            raise Unreachable("the size differs", incomplete_file=name)

    for name in repository.missing(names):
        _with_retries(lambda name=name: fetch_again(name), retries)  # type: ignore[misc]


@contextmanager
def _space_told(repository: Repository, names: Collection[str]) -> Iterator[None]:
    """A disk that others filled meanwhile, told as one that was full before."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        needed = sum(repository.sizes.get(name) or 0 for name in repository.missing(names))
        raise _no_space(repository, needed, free_bytes(_cache_of(repository.name)) or 0) from error


def _no_space(repository: Repository, needed: int, free: int) -> StorageError:
    place = constants.HF_HUB_CACHE
    return StorageError(
        "QH-E22",
        f"The files of {repository.name} need {figures.size(needed)} more; {figures.size(free)} are free at {place}.",
        where=place,
        cause="The hub tells the sizes of the files before they are fetched.",
        fix="Free space there, or set HF_HOME to a folder on a larger disk.",
        context={"needed_bytes": needed, "free_bytes": free},
    )


def http_error() -> type[Exception]:
    """The widest class of the HTTP library, whichever library huggingface_hub is built on."""
    own = ("builtins", HfHubHTTPError.__module__)
    kinds = [kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__module__ not in own]
    return kinds[-1]


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError for good, or into a passing failure."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _http_failure(repository, revision, error) from error
    except LocalEntryNotFoundError as error:
        # snapshot_download wraps what really happened.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _http_failure(repository, revision, error.__cause__) from error
        raise Unreachable(_one_line(error.__cause__ or error)) from error
    except (http_error(), ConnectionError, TimeoutError) as error:
        raise Unreachable(_one_line(error)) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise Unreachable(_one_line(error), incomplete_file=_file_named_in(str(error))) from error
    except HFValidationError:
        raise
    except NOT_OF_A_HUB as error:
        raise Unreachable(f"What answered at {constants.ENDPOINT} is no hub ({_one_line(error)})") from error


def _http_failure(repository: str, revision: str | None, error: Exception) -> Exception:
    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return _refused(
            repository,
            f"The model {repository} is gated: it exists, but this machine's account may not read it.",
            f"Accept its terms on its page, then run: {LOGIN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return _refused(
            repository, f"The model {repository} has no revision {revision!r}.", "Name a branch, tag or commit it has."
        )
    if isinstance(error, DisabledRepoError):
        return _refused(repository, f"The hub has disabled the model {repository}.", "Choose another model.")
    if isinstance(error, RepositoryNotFoundError):
        return _refused(
            repository,
            f"The hub has no model {repository}, or it is private; the hub does not say which.",
            f"Check the spelling; for a private model run: {LOGIN}",
        )
    if status == 429 or status >= 500 or status == 408:
        return Unreachable(f"The hub answered {status}", _retry_after(error))
    return _refused(
        repository, f"The hub refused {repository} with status {status}.", f"Check the account's rights: {LOGIN}"
    )


def _refused(repository: str, message: str, fix: str) -> HubError:
    return HubError("QH-E12", message, where=repository, fix=fix, context={"repository": repository})


def _incomplete(repository: str, file: str) -> HubError:
    return HubError(
        "QH-E13",
        f"{file} of {repository} was incomplete at every attempt; nothing partial was kept.",
        where=repository,
        cause="The connection or a proxy cuts the transfer, or the disk of the cache is full.",
        fix="Check the free space of the cache and the network, then start again.",
        context={"repository": repository, "file": file},
    )


def _retry_after(error: Exception) -> float | None:
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")[:200]


def _file_named_in(message: str) -> str:
    """The file of huggingface_hub's `... has size 12 (NAME).`, where NAME may be the end of an address."""
    found = re.search(r"has size \d+ \((.+)\)\.", message)
    return found.group(1).rsplit("/", 1)[-1] if found else "a file"
