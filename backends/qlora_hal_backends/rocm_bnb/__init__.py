"""`rocm_bnb`: the torch family on AMD. Light: nothing of torch is imported until the trainer is opened."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.torch_family.platform import LAUNCHER, MEMORY, OUTLINE, ROCM, STREAMING_OPTIONS, memory_of


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing import probe_here

    return probe_here(ROCM.backend, "rocm")


SPEC = BackendSpec(
    name=ROCM.backend,
    title=ROCM.title,
    priority=ROCM.priority,
    capabilities=ROCM.capabilities(),
    probe=probe,
    outline=OUTLINE,
    launcher=LAUNCHER,
    trainer="qlora_hal_backends.rocm_bnb.trainer:open_trainer",
    contract=2,
    uses_accelerator=ROCM.uses_accelerator,
    card_vendors=frozenset({"amd"}),
    option_choices=STREAMING_OPTIONS,
    notes=ROCM.optimizer_notes,
    memory=memory_of(MEMORY, fused=False),
)
