"""What a mutant is: the reference backend with one defect, and the sections that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_hal.contract.backend import BackendSpec, QuantizedLoRATrainer
from qlora_hal_conformance.reference_backend import SPEC, probe
from qlora_hal_conformance.reference_backend.rooms import HONEST
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

Open = Callable[[BackendSpec], object]
"""Makes the trainer of a spec; `object`, because one mutant is not even a trainer."""
ChangeSpec = Callable[[BackendSpec], BackendSpec]


def same_spec(spec: BackendSpec) -> BackendSpec:
    return spec


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong backend.

    `defect` is a sentence about what it does; `recreates` the public thread of the bug, or "" where it is a slip that
    every author can make. `caught_by` are section numbers, the earliest first: at least one must fail. Of the sections
    before them only those in `may_fail` may fail too: there the defect shows by the way. `case_seconds` is the time for
    one case: enough for an honest one on a busy machine.
    """

    name: str
    defect: str
    caught_by: tuple[str, ...]
    open: Open
    recreates: str = ""
    change_spec: ChangeSpec = same_spec
    may_fail: tuple[str, ...] = ()
    case_seconds: float = 30.0

    @property
    def spec(self) -> BackendSpec:
        """What `--spec qlora_hal_conformance.mutants.specs:NAME` gives."""
        named = replace(
            SPEC,
            name=self.name,
            title=self.defect,
            trainer=f"{__package__}.trainers:{self.name}",
            probe=lambda: replace(probe(), backend=self.name),
        )
        return self.change_spec(named)

    def trainer(self) -> object:
        """What `--trainer qlora_hal_conformance.mutants.trainers:NAME` gives."""
        return self.open(self.spec)


def with_rooms(**changes: object) -> Open:
    """The reference trainer with some rooms replaced."""
    return lambda spec: ReferenceTrainer(replace(HONEST, **changes), spec)  # type: ignore[arg-type]


def with_trainer(kind: Callable[..., QuantizedLoRATrainer]) -> Open:
    """The reference trainer with one verb rewritten."""
    return lambda spec: kind(spec=spec)
