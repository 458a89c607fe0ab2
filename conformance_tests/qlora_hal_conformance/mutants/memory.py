"""Memory that was not foreseen, and what is left when there is none."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.memory_constants import MemoryConstants
from qlora_hal.contract.values import Adapter, Batch, PendingStep, StepSettings
from qlora_hal.errors import OutOfMemoryError
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

from .registry import Mutant, with_trainer

FLOAT64_ORACLE = MemoryConstants(hidden_copies=24.0, feed_forward_copies=14.0, attention_scores_kept=True)
"""What the reference really keeps of a layer, in float64 beside a float32 run: 770 MB were measured where this
foresees 940. It keeps as much when activations should be recomputed."""


class Measured(ReferenceTrainer):
    """The reference with the peak of its process."""

    def peak_memory_bytes(self) -> int:
        if sys.platform == "darwin":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Not `ru_maxrss`: that survives exec, and is no less than what the suite itself held (getrusage(2)).
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class ErrorOfTheAllocator(ReferenceTrainer):
    @contextmanager
    def memory_named(self, phase: str) -> Iterator[None]:
        yield


class LostWithoutMemory(ReferenceTrainer):
    """Closes itself when memory runs out."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        try:
            super().attach(adapter, optimizer)
        except OutOfMemoryError:
            self.close()
            raise

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        try:
            return super().train_step(window, settings)
        except OutOfMemoryError:
            self.close()
            raise


def measured_with(memory: MemoryConstants) -> Callable[[BackendSpec], BackendSpec]:
    def change(spec: BackendSpec) -> BackendSpec:
        features = spec.capabilities.features | {Feature.PEAK_MEMORY}
        return replace(spec, memory=lambda query: memory, capabilities=replace(spec.capabilities, features=features))

    return change


MUTANTS = (
    Mutant(
        "checkpointing_saves_nothing",
        "Takes gradient checkpointing and keeps every activation.",
        ("60",),
        with_trainer(Measured),
        change_spec=measured_with(FLOAT64_ORACLE),
    ),
    Mutant(
        "activations_not_foreseen",
        "Tells the memory estimate of half the activations that it keeps.",
        ("60",),
        with_trainer(Measured),
        change_spec=measured_with(replace(FLOAT64_ORACLE, hidden_copies=8.0, feed_forward_copies=4.0)),
    ),
    Mutant(
        "process_not_foreseen",
        "Tells the memory estimate of activations alone.",
        ("60",),
        with_trainer(Measured),
        change_spec=measured_with(MemoryConstants(0, 0, 17.0, 10.0, attention_scores_kept=True)),
    ),
    Mutant(
        "allocator_error_untranslated",
        "Lets the error of the allocator through when memory runs out.",
        ("70",),
        with_trainer(ErrorOfTheAllocator),
    ),
    Mutant(
        "lost_when_memory_runs_out",
        "Is of no use any more after memory ran out once.",
        ("70",),
        with_trainer(LostWithoutMemory),
    ),
)
