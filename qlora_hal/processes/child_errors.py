"""Errors on their way from a child process to its parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_hal import errors
from qlora_hal.errors import QloraHalError


def told_of(error: QloraHalError) -> dict[str, object]:
    """An error as JSON holds it on its way between processes; `error_from` reads it."""
    told = {name: getattr(error, name) for name in ("code", "message", "where", "cause", "fix", "context")}
    return {"class": type(error).__name__, **told}


def error_from(told: Mapping[str, Any]) -> QloraHalError:
    """The error that `told_of` wrote down in another process."""
    kind = getattr(errors, told["class"], QloraHalError)
    error: QloraHalError = kind(
        told["code"],
        told["message"],
        where=told["where"],
        cause=told["cause"],
        fix=told["fix"],
        context=told["context"],
    )
    return error
