"""The trainer factory of each mutant by its name, for `--trainer qlora_hal_conformance.mutants.trainers:NAME`."""

from __future__ import annotations

from collections.abc import Callable


def __getattr__(name: str) -> Callable[[], object]:
    from .population import NAMED

    if name not in NAMED:
        raise AttributeError(name)
    return NAMED[name].trainer
