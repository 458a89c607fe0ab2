"""One commit of files to the Hugging Face hub. Nothing there is deleted, and a repository that exists is added to only
where the user says so; its visibility stays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from qlora_hal.errors import ConfigError, HubError
from qlora_hal.model.hub import LOGIN, NOT_OF_A_HUB, http_error, is_offline

_WRITE_LOGIN = f"Run: {LOGIN} (with a token that may write)"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What the hub has now: the commit and its address, and whether the repository is new and private."""

    url: str
    commit: str
    created: bool
    private: bool


def check_repository_name(name: str) -> None:
    """Raises ConfigError QH-U21 for what is no `owner/name` of the hub."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        if name.count("/") == 1:
            return
    raise ConfigError(
        "QH-U21",
        f"{name!r} is no repository of the hub; a name of the form owner/name is expected.",
        where="repository",
        cause="It belongs to an account or an organization; names have letters, digits, - _ and ., at most 96 of them.",
        fix="Give it as owner/name; hf auth whoami prints the name of your account.",
    )


def upload(
    repository: str, files: Mapping[str, bytes | Path], *, message: str, private: bool, exist_ok: bool, quiet: bool
) -> Uploaded:
    """Make the repository where it is not there, and commit all files (name -> content, or where it lies) at once.

    Raises HubError: QH-E23 (not logged in), QH-E24 (no right to write there), QH-E25 (it exists, without `exist_ok`, or
    is public and `private` was asked for), QH-E26 (offline, or not gone through).
    """
    if is_offline():
        raise _not_uploaded(repository, "HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE, then push again.")
    token = get_token()
    if token is None:
        raise _not_logged_in(repository, "This machine has no token of the hub.")
    api = HfApi(token=token)
    with _told(repository, made=False):
        known = _visibility(api, repository)
        if known is None:
            api.create_repo(repository, private=private or None)
        elif not exist_ok:
            raise _exists(repository)
        elif private and not known:
            raise _is_public(repository)
    with _told(repository, made=known is None), _progress(shown=not quiet and sys.stderr.isatty()):
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=message,
        )
        there = api.model_info(repository, revision=commit.oid)
    # The hub leaves out what a .gitignore of the repository names, and its client does not say so.
    missing = sorted(files.keys() - {file.rfilename for file in there.siblings or ()})
    if missing:
        raise _not_uploaded(
            repository,
            f"the hub took the others and left out {', '.join(missing)}, which a .gitignore of the repository can do",
            "Take them out of that .gitignore, then push again with --exist-ok (exist_ok=True in Python).",
        )
    return Uploaded(commit.commit_url, commit.oid, created=known is None, private=bool(there.private))


def _visibility(api: HfApi, repository: str) -> bool | None:
    """Whether a repository is private; None where there is none that this account may see."""
    try:
        return bool(api.model_info(repository).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def _progress(*, shown: bool) -> Iterator[None]:
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _told(repository: str, *, made: bool) -> Iterator[None]:
    """Failures of the hub and of the way to it as HubErrors. `made`: the repository is new."""
    again = "push again with --exist-ok (exist_ok=True in Python)" if made else "push again"
    try:
        yield
    except HfHubHTTPError as error:
        _raise_refusal(repository, error, again)
    except (http_error(), ConnectionError, TimeoutError) as error:
        raise _not_uploaded(repository, _one_line(error), f"Check the network and the proxy, then {again}.") from error
    except (*NOT_OF_A_HUB, RuntimeError) as error:
        # Of an answer that is not the hub's, and of the library that moves large files.
        raise _not_uploaded(repository, _one_line(error), f"Check that HF_ENDPOINT is a hub, then {again}.") from error


def _raise_refusal(repository: str, error: HfHubHTTPError, again: str) -> NoReturn:
    status = error.response.status_code
    if status == 401:
        raise _not_logged_in(repository, "The hub does not accept this machine's token.") from error
    if status == 403:
        raise HubError(
            "QH-E24",
            f"This account or its token may not write to {repository}.",
            where=repository,
            cause="It is somebody else's, or the token may only read.",
            fix=f"Name a repository of your own, or {_WRITE_LOGIN[0].lower()}{_WRITE_LOGIN[1:]}.",
            context={"repository": repository},
        ) from error
    if status == 409:
        raise _exists(repository) from error
    raise _not_uploaded(repository, f"The hub answered {status}", f"Wait a while, then {again}.") from error


def _not_logged_in(repository: str, message: str) -> HubError:
    return HubError("QH-E23", message, where=repository, fix=f"{_WRITE_LOGIN}.", context={"repository": repository})


def _exists(repository: str) -> HubError:
    return HubError(
        "QH-E25",
        f"{repository} exists already; nothing was sent.",
        where=repository,
        cause="Files of the same names would get new contents there; earlier ones stay in its history.",
        fix="Add --exist-ok (exist_ok=True in Python) to add a commit to it, or give another name.",
        context={"repository": repository},
    )


def _is_public(repository: str) -> HubError:
    return HubError(
        "QH-E25",
        f"{repository} exists and is public, and private was asked for; nothing was sent.",
        where=repository,
        cause="A push does not change who may see a repository.",
        fix="Make it private on its settings page, or give another name.",
        context={"repository": repository},
    )


def _not_uploaded(repository: str, reason: str, fix: str) -> HubError:
    return HubError(
        "QH-E26",
        f"The upload to {repository} did not go through: {reason}.",
        where=repository,
        cause="What lies on this machine is unchanged; the hub takes all files of a commit or none.",
        fix=fix,
        context={"repository": repository},
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")[:200]
