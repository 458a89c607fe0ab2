"""Snapshots from the Hugging Face hub: only files that are safe to open, retried, checked for size, or a clear error.

huggingface_hub is imported inside functions: it costs a good part of a second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_hal.errors import HubError
from qlora_hal.model.safety import refuse_pickle_only

SAFE_PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Weights, configuration, tokenizer files, chat templates and terms of use; nothing that runs."""

CODE_PATTERNS = ("*.py",)
"""Fetched only with trust_remote_code and a pinned commit."""

_LOGIN = "hf auth login"
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
class Snapshot:
    """A folder of the cache and the commit it belongs to."""

    path: Path
    commit: str


def fetch_snapshot(
    repository: str, *, revision: str | None, trust_remote_code: bool, retries: Retries | None = None
) -> Snapshot:
    """Download what is missing of a model and return its folder.

    Raises HubError QH-E11 when the hub cannot be reached and the cache has no copy, QH-E12 when the model or revision
    is missing, private or gated, QH-E13 when a file stays incomplete; UnsafeInputError QH-C17 for pickle-only models.
    """
    retries = retries or Retries()
    patterns = SAFE_PATTERNS + (CODE_PATTERNS if trust_remote_code else ())
    if _offline():
        return _cached(repository, revision, patterns, "HF_HUB_OFFLINE is set", None)
    try:
        sizes = _with_retries(lambda: _listed(repository, revision), retries)
        refuse_pickle_only(sizes, where=repository, on_hub=True)
        path = _with_retries(lambda: _downloaded(repository, revision, patterns), retries)
        _complete(repository, path, sizes, retries)
    except _PassingFailure as failure:
        if failure.incomplete_file:
            raise _incomplete(repository, failure.incomplete_file) from failure
        return _cached(repository, revision, patterns, failure.reason, failure)
    return Snapshot(path, path.name)


class _PassingFailure(Exception):
    """A failure that a later attempt may not meet."""

    def __init__(self, reason: str, asked_seconds: float | None = None, incomplete_file: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.asked_seconds = asked_seconds
        self.incomplete_file = incomplete_file


def _with_retries(call: Callable[[], _Result], retries: Retries) -> _Result:
    for attempt in range(retries.attempts):
        try:
            return call()
        except _PassingFailure as failure:
            if attempt + 1 == retries.attempts:
                raise
            retries.pause(attempt, failure.asked_seconds)
    raise AssertionError("at least one attempt is made")


def _offline() -> bool:
    return bool(constants.HF_HUB_OFFLINE)


def _listed(repository: str, revision: str | None) -> dict[str, int | None]:
    """File names of the repository with their sizes in bytes, where the hub tells them."""
    with _hub_errors(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    return {file.rfilename: file.size for file in info.siblings or ()}


def _downloaded(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    with _hub_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def _complete(repository: str, path: Path, sizes: Mapping[str, int | None], retries: Retries) -> None:
    """Fetch again what lies in the cache with another size than the hub has; a partial file never gets further."""

    def wrong(name: str) -> bool:
        file, expected = path / name, sizes[name]
        return expected is not None and file.is_file() and file.stat().st_size != expected

    def fetch_again(name: str) -> None:
        with _hub_errors(repository, path.name):
            hf_hub_download(repository, name, revision=path.name, force_download=True)
        if wrong(name):
            raise _PassingFailure("the size differs", incomplete_file=name)

    for name in filter(wrong, sizes):
        _with_retries(lambda name=name: fetch_again(name), retries)  # type: ignore[misc]


def _cached(
    repository: str, revision: str | None, patterns: Sequence[str], reason: str, cause: Exception | None
) -> Snapshot:
    try:
        path = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns), local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        partly = type(error).__name__ == "IncompleteSnapshotError"  # huggingface_hub 0 has no such class
        raise HubError(
            "QH-E11",
            f"The model {repository} cannot be fetched, and this machine's cache has "
            f"{'only a part of it' if partly else 'no copy'}.",
            where=repository,
            cause=f"{reason}.",
            fix="Check the network, the proxy and HF_HUB_OFFLINE, or copy the model's folder here and give its path.",
            context={"repository": repository, "revision": revision},
        ) from (cause or error)
    return Snapshot(path, path.name)


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError for good, or into a passing failure."""
    # The widest class of the HTTP library, whichever library huggingface_hub is built on.
    own = ("builtins", HfHubHTTPError.__module__)
    kinds = [kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__module__ not in own]
    http_error: type[Exception] = kinds[-1]
    try:
        yield
    except HfHubHTTPError as error:
        raise _http_failure(repository, revision, error) from error
    except LocalEntryNotFoundError as error:
        # snapshot_download wraps what really happened.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _http_failure(repository, revision, error.__cause__) from error
        raise _PassingFailure(_one_line(error.__cause__ or error)) from error
    except (http_error, ConnectionError, TimeoutError) as error:
        raise _PassingFailure(_one_line(error)) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise _PassingFailure(_one_line(error), incomplete_file=_file_named_in(str(error))) from error


def _http_failure(repository: str, revision: str | None, error: Exception) -> Exception:
    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return _refused(
            repository,
            f"The model {repository} is gated: it exists, but this machine's account may not read it.",
            f"Accept its terms on its page, then run: {_LOGIN}",
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
            f"Check the spelling; for a private model run: {_LOGIN}",
        )
    if status == 429 or status >= 500 or status == 408:
        return _PassingFailure(f"The hub answered {status}", _retry_after(error))
    return _refused(
        repository, f"The hub refused {repository} with status {status}.", f"Check the account's rights: {_LOGIN}"
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
        return float(headers.get("Retry-After", ""))
    except ValueError:
        return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")[:200]


def _file_named_in(message: str) -> str:
    """The file of huggingface_hub's `... has size 12 (NAME).`, where NAME may be the end of an address."""
    found = re.search(r"has size \d+ \((.+)\)\.", message)
    return found.group(1).rsplit("/", 1)[-1] if found else "a file"
