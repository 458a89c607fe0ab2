"""The spec of each mutant by its name, for `--spec qlora_hal_conformance.mutants.specs:NAME`."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec


def __getattr__(name: str) -> BackendSpec:
    from .population import BY_NAME

    if name not in BY_NAME:
        raise AttributeError(name)
    return BY_NAME[name].spec
