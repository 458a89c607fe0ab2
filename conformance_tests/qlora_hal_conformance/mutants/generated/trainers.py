"""The trainer factory of each change by its identity, as `specs` names it."""

from __future__ import annotations

from collections.abc import Callable

from .private_copy import private_copy


def __getattr__(name: str) -> Callable[[], object]:
    return private_copy(name).open_trainer
