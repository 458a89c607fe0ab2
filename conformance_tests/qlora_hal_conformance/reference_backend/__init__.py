"""`reference`: an honest backend of NumPy alone. It trains tiny Llamas slowly and shows what the contract asks.

It is the null driver that lets the suite be tested without a tensor library, and the body that every mutant is a small
change of. It is registered nowhere, so no run ever takes it by itself; name it with `--spec
qlora_hal_conformance.reference_backend:SPEC`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat

NAME = "reference"
FOUR_BIT_BLOCK_SIZES = (64, 32, 128, 256)
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite"})
FAMILIES |= {"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss"}

CAPABILITIES = Capabilities(
    weight_formats=frozenset({WeightFormat.NONE, WeightFormat.INT8, WeightFormat.NF4, WeightFormat.FP4}),
    compute_dtypes=frozenset({"float32", "bfloat16"}),
    features=frozenset(
        {
            Feature.DOUBLE_QUANT,
            Feature.QUANTIZE_ON_LOAD,
            Feature.LOAD_PREQUANTIZED,
            Feature.GRADIENT_CHECKPOINTING,
            Feature.LORA_DROPOUT,
            Feature.PACKING,
            Feature.BITWISE_DETERMINISM,
            Feature.GENERATE,
            Feature.TOKEN_WEIGHTS,
            Feature.DATA_PARALLEL,
            Feature.SHARDED_BASE,
            Feature.EXPERTS,
            Feature.FP8_PRODUCTS,
        }
    ),
    block_sizes={WeightFormat.NF4: FOUR_BIT_BLOCK_SIZES, WeightFormat.FP4: FOUR_BIT_BLOCK_SIZES},
    levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8, "4bit": WeightFormat.NF4},
    architectures=FAMILIES,
    families=FAMILIES,
)


def probe() -> ProbeReport:
    """Package metadata only."""
    if importlib.util.find_spec("numpy") is None:
        return ProbeReport(
            NAME, Availability.MISSING_PACKAGE, "NumPy is not installed.", "Install it: pip install numpy."
        )
    versions = {"numpy": importlib.metadata.version("numpy"), "python": platform.python_version()}
    return ProbeReport(
        NAME, Availability.READY, "NumPy is all it needs.", devices=(platform.machine(),), versions=versions
    )


SPEC = BackendSpec(
    name=NAME,
    title="NumPy reference, for testing the suite",
    priority=-1,
    capabilities=CAPABILITIES,
    probe=probe,
    trainer="qlora_hal_conformance.reference_backend.trainer:open_trainer",
    contract=2,
    uses_accelerator=False,
)
