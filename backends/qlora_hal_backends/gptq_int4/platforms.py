"""Where this backend runs and what it can do there, as data."""

from __future__ import annotations

from dataclasses import replace

from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat
from qlora_hal_backends.gptq_int4.engines import GPTQ_OPTIONS
from qlora_hal_backends.torch_family.platform import MEMORY as PLAIN
from qlora_hal_backends.torch_family.platform import TORCH_OPTIONS, TorchPlatform

NAME = "gptq_int4"
TITLE = "GPTQ INT4 checkpoints (GPTQModel, or auto-gptq in its own environment)"
PRIORITY = -10
"""Below every backend that quantizes while it loads: this one is chosen for what it alone has."""

GROUP_SIZES = (128, 64, 32, 16, 256, 512, 1024)
"""Those of gptqmodel 7.6; one group over all inputs (-1) has no size."""

FEATURES = frozenset(
    {
        Feature.LOAD_PREQUANTIZED,
        Feature.GRADIENT_CHECKPOINTING,
        Feature.LORA_DROPOUT,
        Feature.PACKING,
        Feature.GENERATE,
        Feature.TOKEN_WEIGHTS,
        Feature.RECOMPUTATION_CHOICE,
        Feature.ADAMW_8BIT,
        Feature.PAGED_ADAMW,
        Feature.PAGED_ADAMW_8BIT,
        Feature.PEAK_MEMORY,
        Feature.DATA_PARALLEL,
    }
)
"""What holds on every device. GPTQ needs calibration, so nothing is quantized while loading: the core has a 16-bit
model quantized first (`BackendSpec.quantizer`)."""

FORMATS = frozenset({WeightFormat.INT4_GPTQ, WeightFormat.INT8_GPTQ})

CAPABILITIES = Capabilities(
    weight_formats=FORMATS,
    compute_dtypes=frozenset({"bfloat16", "float16", "float32"}),
    features=FEATURES,
    block_sizes=dict.fromkeys(FORMATS, GROUP_SIZES),
    levels={"4bit": WeightFormat.INT4_GPTQ, "8bit": WeightFormat.INT8_GPTQ},
    calibrated_formats=FORMATS,
)

OPTIONS = {**TORCH_OPTIONS, **GPTQ_OPTIONS}

MEMORY = replace(PLAIN, dequantized_copies=3, working_layers=0.35)
"""Dequantizing in plain torch keeps the codes as int32 and the scales spread over the inputs beside the result. The
layers of transformers 4.53, which auto-gptq needs, hold a third of a layer more than those of 5 while one is
differentiated (section 60 of the suite, with recomputation: up to 39.5 MB where 31.7 were foreseen without it)."""

_OPTIMIZER_NOTES = {
    "paged_adamw": "paged_adamw is adamw on the CPU: it has nothing to page to",
    "paged_adamw_8bit": "paged_adamw_8bit is adamw_8bit on the CPU: it has nothing to page to",
}

CUDA = TorchPlatform(
    backend=NAME,
    title=TITLE,
    device="cuda",
    torch_device="cuda",
    priority=PRIORITY,
    preferred_dtypes=("bfloat16", "float16", "float32"),
    features=FEATURES,
    optimizer_notes={},
)
ROCM = TorchPlatform(
    backend=NAME,
    title=TITLE,
    device="rocm",
    torch_device="cuda",
    priority=PRIORITY,
    preferred_dtypes=("bfloat16", "float16", "float32"),
    features=FEATURES,
    optimizer_notes={},
)
CPU = TorchPlatform(
    backend=NAME,
    title=TITLE,
    device="cpu",
    torch_device="cpu",
    priority=PRIORITY,
    preferred_dtypes=("float32", "bfloat16"),
    features=FEATURES,
    optimizer_notes=_OPTIMIZER_NOTES,
    uses_accelerator=False,
)
