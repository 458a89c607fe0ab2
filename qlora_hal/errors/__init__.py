"""Every failure a user can see, as typed exceptions with a stable code.

A message says what came in, what was expected and one thing to do. Codes are `QH-` plus the row of the fault catalogue
(`docs/faults.md`); `qlora-hal explain CODE` prints the row. This module imports next to nothing, so any room may
use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from qlora_hal.errors.terminal_text import visible


class QloraHalError(Exception):
    """A failure with a code, a cause and one remedy.

    Attributes: `code` (stable, `QH-D05`), `message` (what happened, with the value received), `where` (file, row or
    setting), `cause` (why), `fix` (one thing to do), `context` (facts for `--json`), `exit_status` (of the command
    line; `docs/cli.md`).
    """

    exit_status: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fix: str,
        cause: str = "",
        where: str = "",
        context: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix
        self.cause = cause
        self.where = where
        self.context: dict[str, object] = dict(context or {})

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.cause:
            lines.append(f"  why:   {self.cause}")
        lines.append(f"  help:  {self.fix}")
        return visible("\n".join(lines))

    def as_json(self) -> dict[str, object]:
        """The form that `--json` prints."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "cause": self.cause,
            "help": self.fix,
            **self.context,
        }


class ConfigError(QloraHalError):
    """The user's file, flags or keywords are wrong."""

    exit_status = 2


class UnsupportedFeatureError(ConfigError):
    """The request is valid, but the chosen backend cannot serve it; the context names who can."""


class BackendError(QloraHalError):
    """A backend or the machine's software stands in the way."""

    exit_status = 3


class BackendNotFoundError(BackendError):
    """No installed backend has the name asked for."""


class BackendUnavailableError(BackendError):
    """The backend is installed but cannot run here; `context["reports"]` holds every probe report."""


class BackendConflictError(BackendError):
    """Two distributions offer one backend name."""


class BackendContractError(BackendError):
    """A plugin broke its promise: wrong shape, missing tensor, foreign exception. The message names the plugin."""


class DataError(QloraHalError):
    """Rows, files or templates that cannot be trained on."""

    exit_status = 4


class ModelError(QloraHalError):
    """The base model: architecture, weights, tokenizer, target modules that match nothing."""

    exit_status = 5


class AdapterError(QloraHalError):
    """An adapter that does not fit; every wrong tensor is listed, not only the first."""

    exit_status = 5


class NumericsError(QloraHalError):
    """A non-finite loss or gradient, or an adapter that no gradient reaches."""

    exit_status = 6


class OutOfMemoryError(QloraHalError):
    """The device ran out of memory; the context holds the estimate and the measured peak."""

    exit_status = 7


class StorageError(QloraHalError):
    """The output place cannot be written: permission, space, kind of file."""

    exit_status = 8


class CheckpointError(QloraHalError):
    """No checkpoint passes verification, or one belongs to another run."""

    exit_status = 9


class UnsafeInputError(QloraHalError):
    """Refused for safety: pickle, remote code, hostile file, escaping path."""

    exit_status = 10


class HubError(QloraHalError):
    """Network or hub: offline, gated, missing."""

    exit_status = 11


class OutputLockedError(QloraHalError):
    """Another live run holds the output folder."""

    exit_status = 12


class StoppedError(QloraHalError):
    """Stopped on request with the state saved; run again to go on (EX_TEMPFAIL)."""

    exit_status = 75
