"""The spec of each change by its identity, for `--spec qlora_hal_conformance.mutants.generated.specs:IDENTITY`."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec

from .private_copy import private_copy


def __getattr__(name: str) -> BackendSpec:
    return private_copy(name).spec
