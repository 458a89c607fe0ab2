"""`mps_bnb`: the torch family on Apple. Light: nothing of torch is imported until the trainer is opened."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.torch_family.platform import MEMORY, MPS, OUTLINE, STREAMING_OPTIONS, memory_of


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing import probe_here

    return probe_here(MPS.backend, "mps")


SPEC = BackendSpec(
    name=MPS.backend,
    title=MPS.title,
    priority=MPS.priority,
    capabilities=MPS.capabilities(),
    probe=probe,
    outline=OUTLINE,
    trainer="qlora_hal_backends.mps_bnb.trainer:open_trainer",
    contract=2,
    uses_accelerator=MPS.uses_accelerator,
    card_vendors=frozenset({"apple"}),
    option_choices=STREAMING_OPTIONS,
    notes=MPS.optimizer_notes,
    memory=memory_of(MEMORY, fused=False),
)
