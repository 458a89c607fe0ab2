"""The NumPy reference with the peak of its process, once foreseen and twice not. Tests only."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path

from qlora_hal.backend import BackendSpec
from qlora_hal.capabilities import Feature
from qlora_hal.memory_constants import MemoryConstants
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer


class MeasuredReference(ReferenceTrainer):
    """Takes gradient checkpointing and keeps every activation all the same."""

    def peak_memory_bytes(self) -> int:
        if sys.platform == "darwin":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _with(memory: MemoryConstants) -> BackendSpec:
    features = SPEC.capabilities.features | {Feature.PEAK_MEMORY}
    return replace(
        SPEC,
        memory=memory,
        capabilities=replace(SPEC.capabilities, features=features),
        trainer="measured_reference:MeasuredReference",
    )


# In float64 beside a float32 run, and with every intermediate kept. One layer is differentiated beside all of them.
FORESEEN = _with(MemoryConstants(hidden_copies=24.0, feed_forward_copies=14.0, attention_scores_kept=True))
HALF_FORESEEN = _with(MemoryConstants(hidden_copies=8.0, feed_forward_copies=4.0, attention_scores_kept=True))
