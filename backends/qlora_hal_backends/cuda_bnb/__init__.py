"""`cuda_bnb`: the torch family on NVIDIA. Light: nothing of torch is imported until the trainer is opened."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.torch_family.platform import CUDA, LAUNCHER, MEMORY, OUTLINE, STREAMING_OPTIONS, memory_of


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing import probe_here

    return probe_here(CUDA.backend, "cuda")


SPEC = BackendSpec(
    name=CUDA.backend,
    title=CUDA.title,
    priority=CUDA.priority,
    capabilities=CUDA.capabilities(),
    probe=probe,
    outline=OUTLINE,
    launcher=LAUNCHER,
    trainer="qlora_hal_backends.cuda_bnb.trainer:open_trainer",
    contract=2,
    uses_accelerator=CUDA.uses_accelerator,
    card_vendors=frozenset({"nvidia"}),
    option_choices=STREAMING_OPTIONS,
    notes=CUDA.optimizer_notes,
    memory=memory_of(MEMORY, fused=True),
)
