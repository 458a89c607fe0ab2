"""`mlx_lora`: MLX on Apple silicon, and on Linux with MLX's CPU library. Light: no MLX is imported here."""

from __future__ import annotations

import sys

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal_backends.mlx_lora.capabilities import (
    CAPABILITIES,
    IS_CPU,
    MEMORY,
    MLX_NOTES,
    MLX_OPTIONS,
    set_environment,
)


def probe() -> ProbeReport:
    """Package metadata and device nodes only."""
    from qlora_hal_backends.probing import probe_mlx

    return probe_mlx("mlx_lora")


SPEC = BackendSpec(
    name="mlx_lora",
    title="MLX on Apple silicon",
    # Without Metal it is there to be tried, and for the conformance suite: cpu_torch is faster.
    priority=-10 if IS_CPU else 90,
    capabilities=CAPABILITIES,
    probe=probe,
    trainer="qlora_hal_backends.mlx_lora.trainer:MLXLoRATrainer",
    contract=2,
    outline="qlora_hal_backends.mlx_lora.outline:outline",
    launcher="qlora_hal_backends.mlx_lora.launching",
    uses_accelerator=not IS_CPU,
    card_vendors=frozenset({"apple", "nvidia"}),
    option_choices=MLX_OPTIONS,
    notes=MLX_NOTES,
    memory=lambda query: MEMORY,
    # Metal ends the process, from a thread of its own, when a command fails.
    supervised=sys.platform == "darwin",
    prepare_process=set_environment,
)
