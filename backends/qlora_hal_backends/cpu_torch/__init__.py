"""`cpu_torch`: the torch family on CPU. Light: nothing of torch is imported until the trainer is opened."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.torch_family.platform import CPU, LAUNCHER, OUTLINE, STREAMING_OPTIONS, host_memory


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing import probe_here

    return probe_here(CPU.backend, "cpu")


SPEC = BackendSpec(
    name=CPU.backend,
    title=CPU.title,
    priority=CPU.priority,
    capabilities=CPU.capabilities(),
    probe=probe,
    outline=OUTLINE,
    launcher=LAUNCHER,
    trainer="qlora_hal_backends.cpu_torch.trainer:open_trainer",
    contract=2,
    uses_accelerator=CPU.uses_accelerator,
    card_vendors=frozenset(),
    option_choices=STREAMING_OPTIONS,
    notes=CPU.optimizer_notes,
    memory=host_memory,
)
