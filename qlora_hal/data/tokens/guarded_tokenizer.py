"""The Rust tokenizer behind a wall: whatever it raises becomes a ModelError.

A fault inside the library is a `PanicException`, which is no `Exception`: it would pass every handler up to the end of
the process. It has no public name to import.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from qlora_hal.data.tokens.tokenizer_checks import MAX_TOKENIZER_BYTES, HostileTokenizer, checked, refuse_slow_or_broken
from qlora_hal.errors import ModelError, UnsafeInputError
from qlora_hal.files.opening import read_stored
from qlora_hal.files.strict_json import JsonProblem
from qlora_hal.processes.held_stderr import HeldStderr, held_stderr

_LONGEST_REASON = 300
_AT_WORK = ("encode", "decode")
"""How the calls begin that read texts; others are lookups, too many and too short to hold a stream for."""


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, checked. Raises ModelError (QH-D52), UnsafeInputError (QH-X15)."""
    try:
        raw = read_stored(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise broken(path, error.strerror or str(error)) from error
    return _checked_tokenizer(raw, path)


def converted(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """A tokenizer that another library made of a folder's files, checked as a tokenizer.json is.

    Raises ModelError (QH-D52), UnsafeInputError (QH-X15).
    """
    with panics_told(folder):
        raw = tokenizer.to_str().encode("utf-8")
    return _checked_tokenizer(raw, folder)


def _checked_tokenizer(raw: bytes, path: Path) -> Tokenizer:
    with hostility_told(path):
        try:
            content = checked(raw)
        except JsonProblem as error:
            raise broken(path, str(error)) from error
        with panics_told(path):
            tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            refuse_slow_or_broken(tokenizer, content)
    return guarded(tokenizer, path)


@contextmanager
def hostility_told(path: Path) -> Iterator[None]:
    """HostileTokenizer becomes UnsafeInputError (QH-X15) about this file or folder."""
    try:
        yield
    except HostileTokenizer as error:
        raise UnsafeInputError(
            "QH-X15",
            f"The tokenizer is refused: {error}.",
            where=str(path),
            cause="A few bytes in it would take excessive memory or time.",
            fix="Download the model again, and compare the file with its source's.",
        ) from error


def guarded(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer, every call of which raises ModelError (QH-D52) where the library fails; `path` is its file."""
    return cast("Tokenizer", _Guarded(tokenizer, path))


@contextmanager
def panics_told(path: Path) -> Iterator[None]:
    """A wall around calls of the library: its faults become ModelError (QH-D52), and what it prints of a panic is not
    shown."""
    with held_stderr() as held, _faults_told(path, held):
        yield


@contextmanager
def _faults_told(path: Path, held: HeldStderr | None = None) -> Iterator[None]:
    try:
        yield
    except HostileTokenizer:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise
        if is_panic and held is not None:
            held.drop()
        raise broken(path, str(error)[:_LONGEST_REASON] or type(error).__name__) from error


def broken(path: Path, reason: str) -> ModelError:
    """The error for a tokenizer that cannot be read or fails (QH-D52)."""
    return ModelError(
        "QH-D52",
        f"The tokenizer cannot be read or fails: {reason}.",
        where=str(path),
        fix="Download the model again, with its tokenizer.json and tokenizer_config.json.",
    )


class _Guarded:
    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._tokenizer, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            with (panics_told if name.startswith(_AT_WORK) else _faults_told)(self._path):
                return found(*args, **kwargs)

        return call
