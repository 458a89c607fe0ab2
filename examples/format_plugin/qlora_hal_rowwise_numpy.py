"""A backend that has the format: the suite's reference backend, which decodes any record with its codec.

A backend of one's own declares the format in the same three places, and decodes the stored tensors with its own code.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_hal.contract.backend import ProbeReport
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_conformance import reference_backend
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

INT4_ROWWISE = WeightFormat("int4_rowwise")


def probe() -> ProbeReport:
    return replace(reference_backend.probe(), backend=SPEC.name)


def open_trainer() -> ReferenceTrainer:
    return ReferenceTrainer(spec=SPEC)


SPEC = replace(
    reference_backend.SPEC,
    name="rowwise_numpy",
    title="NumPy, with 4-bit integers by rows",
    capabilities=replace(
        reference_backend.CAPABILITIES,
        weight_formats=reference_backend.CAPABILITIES.weight_formats | {INT4_ROWWISE},
        levels={**reference_backend.CAPABILITIES.levels, "4bit": INT4_ROWWISE},
    ),
    probe=probe,
    trainer="qlora_hal_rowwise_numpy:open_trainer",
)
