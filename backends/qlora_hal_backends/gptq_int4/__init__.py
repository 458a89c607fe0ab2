"""`gptq_int4`: GPTQ checkpoints on CUDA, ROCm and the CPU. Light: nothing of torch or of an engine is imported here."""

from __future__ import annotations

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.gptq_int4.platforms import CAPABILITIES, CPU, MEMORY, NAME, OPTIONS, PRIORITY, TITLE
from qlora_hal_backends.torch_family.platform import LAUNCHER, OUTLINE, memory_of


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing_gptq import probe_gptq

    return probe_gptq(NAME)


SPEC = BackendSpec(
    name=NAME,
    title=TITLE,
    priority=PRIORITY,
    capabilities=CAPABILITIES,
    probe=probe,
    outline=OUTLINE,
    launcher=LAUNCHER,
    trainer="qlora_hal_backends.gptq_int4.trainer:open_trainer",
    contract=2,
    card_vendors=frozenset({"nvidia", "amd"}),
    option_choices=OPTIONS,
    notes=CPU.optimizer_notes,
    memory=memory_of(MEMORY, fused=True),
    quantizer="qlora_hal_backends.gptq_int4.quantizing:GptqQuantizer",
)
