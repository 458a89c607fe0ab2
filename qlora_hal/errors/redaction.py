"""What is told and written down without its secrets: tokens, passwords, and where a home folder lies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

REMOVED = "[removed]"
"""What stands in the place of a secret."""


def redacted(value: object, secrets: Sequence[str] | None = None) -> object:
    """The value with secrets replaced and the home folder written as `~`, through all lists and mappings."""
    known = environment_secrets(os.environ) if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            _redacted_text(str(key), known): REMOVED
            if is_secret_name(str(key)) and isinstance(item, str)
            else redacted(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item, known) for item in value]
    if isinstance(value, (str, Path)):
        return _redacted_text(str(value), known)
    return value


def published(value: object) -> object:
    """The value for a stranger's eyes: redacted, and of every path only its last name."""
    return redacted(_without_folders(value))


def _without_folders(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    if isinstance(value, (str, Path)) and _PATH.match(str(value)):
        return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    return value


def environment_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of environment variables whose names say that they are secret, and the passwords in addresses that any of
    them holds; longest first. Short values are no secrets, and would stand in many words."""
    named = (value for name, value in environ.items() if is_secret_variable(name))
    logins = (login for value in environ.values() for login in _LOGIN_PASSWORD.findall(value))
    return tuple(sorted({value for value in (*named, *logins) if len(value) >= 8}, key=len, reverse=True))


def is_secret_name(name: str) -> bool:
    """Whether the name of a setting or of an environment variable says that its value is secret."""
    return _SECRET_KEY.search(name) is not None and _TOKEN_OF_A_VOCABULARY.search(name) is None


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is secret: `X_KEY`, `PGPASSWORD`, `GH_PAT`."""
    return name not in _OPEN_VARIABLES and (is_secret_name(name) or _SECRET_VARIABLE.search(name) is not None)


_PATH = re.compile(r"/|\\\\|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")
_SECRET_KEY = re.compile(
    r"(?i)(^|_|-|\.)(token|api_?key|[a-z0-9]+[_-]key|secret|password|passwd|passphrase|credential|authorization)s?$"
)
_TOKEN_OF_A_VOCABULARY = re.compile(
    r"(?i)(^|[_.-])(bos|eos|pad|unk|sep|cls|mask|stop|eot|image|special|added)[_-]tokens?$"
)
_SECRET_VARIABLE = re.compile(
    r"(?i)(password|passwd|passphrase|secret|credential|api_?key|token(?!izer))"
    r"|(^|_)(key|keys|pass|pwd|pat|auth|creds?|jwt|bearer|cookie|dsn|sas|private|conn(ection)?_?str(ing)?)(_|$)"
    r"|pass$"
)
_OPEN_VARIABLES = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK"})
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[A-Za-z0-9_-]{20,}"
    r"|[sr]k_(live|test)_\w{16,}|(AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|npm_\w{30,}|pypi-[\w-]{30,}"
    r"|dckr_pat_[\w-]{16,})"
)
"""Texts that access tokens are known by. None of these can begin within what another try has read: a text of a stranger
takes time that grows with its length alone, here and below."""
_WEB_TOKEN = re.compile(r"\beyJ[\w-]{8,}+(\.[\w-]{8,}+\.[\w-]{8,}+)?")
"""A JSON Web Token; without its two other parts it is none, and is read over."""
_SECRET_PAIR = re.compile(
    r"(?i)(?<![\w-])((?:[\w-]*[_-])?(?:password|passwd|pwd|secret|token|api_?key|access_?key|account_?key|"
    r"shared_?access_?key|signature|sig)\s?=\s?|bearer (?=[\w.~+/-]{20}))[^\s&;,\"'<>]{6,}"
)
"""A name and its secret, as connection strings and queries have them."""
_WORDS = re.compile(r"[^\s\"'<>]+")
_URL_LOGIN = re.compile(r"(?<=://)(?:[^\s/@\"'<>]+|[^\s/@:\"'<>]*:[^\s\"'<>]+)@")
_LOGIN_PASSWORD = re.compile(r"://[^\s/@:]*:([^\s\"'<>]+)@")


def _redacted_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    text = _WEB_TOKEN.sub(_without_web_token, _SECRET_TEXT.sub(REMOVED, text))
    text = _WORDS.sub(_without_login, text)
    text = _SECRET_PAIR.sub(r"\1[removed]", text)
    home = str(Path.home())
    if home in ("", "/", "\\"):
        return text
    return re.sub(rf"(?<![\w/\\]){re.escape(home)}(?=$|[/\\\s\"',:;)\]])", "~", text)


def _without_web_token(match: re.Match[str]) -> str:
    return REMOVED if match.group(1) else match.group()


def _without_login(match: re.Match[str]) -> str:
    """A word without logins. Nothing behind its last @ is one: with that end, what begins like one is one."""
    word = match.group()
    end = word.rfind("@") + 1
    return _URL_LOGIN.sub("[removed]@", word[:end]) + word[end:] if end else word
