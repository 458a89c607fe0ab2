"""The spec of each mutant by its name, for `--spec qlora_hal_conformance.mutants.specs:NAME`."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec


def __getattr__(name: str) -> BackendSpec:
    from .population import NAMED

    if name not in NAMED:
        raise AttributeError(name)
    return NAMED[name].spec
