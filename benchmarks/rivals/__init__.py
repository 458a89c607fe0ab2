"""Other libraries as backends of the contract, so that the suite can judge them: thin, and outside the wheel.

Each adapter hands the contract's calls to the library's own model, LoRA layers, loss and optimizer, as its users get
them, and does nothing better than the library does. What a library cannot do is not declared, and so refused. Nothing
heavy is imported here. `docs/rivals.md` has the figures and the commands.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat

_TRANSFORMERS_FORMATS = frozenset({WeightFormat.NONE, WeightFormat.INT8, WeightFormat.NF4, WeightFormat.FP4})
_AFFINE = (
    WeightFormat.INT2_AFFINE,
    WeightFormat.INT3_AFFINE,
    WeightFormat.INT4_AFFINE,
    WeightFormat.INT5_AFFINE,
    WeightFormat.INT6_AFFINE,
    WeightFormat.INT8_AFFINE,
)
_ON_EVERY_RIVAL = frozenset({Feature.QUANTIZE_ON_LOAD, Feature.LOAD_PREQUANTIZED, Feature.GENERATE})
_OF_TRANSFORMERS = _ON_EVERY_RIVAL | {
    Feature.DOUBLE_QUANT,
    Feature.GRADIENT_CHECKPOINTING,
    Feature.PACKING,
    Feature.ADAMW_8BIT,
}


def _probe(backend: str, packages: Sequence[str], needs_gpu: bool = False) -> ProbeReport:
    missing = [package for package in packages if importlib.util.find_spec(package.replace("-", "_")) is None]
    if missing:
        names = " ".join(missing)
        return ProbeReport(backend, Availability.MISSING_PACKAGE, f"Missing: {names}.", f"Run: pip install {names}")
    versions = {package: importlib.metadata.version(package) for package in packages}
    device = "cuda" if needs_gpu else "cpu"
    return ProbeReport(backend, Availability.READY, f"Runs on: {device}.", devices=(device,), versions=versions)


def _spec(
    name: str, title: str, trainer: str, capabilities: Capabilities, probe: Callable[[], ProbeReport], *, gpu: bool
) -> BackendSpec:
    return BackendSpec(
        name=name,
        title=title,
        priority=-100,
        capabilities=capabilities,
        probe=probe,
        trainer=f"benchmarks.rivals.{trainer}",
        contract=2,
        uses_accelerator=gpu,
    )


_PEFT_CAPABILITIES = Capabilities(
    weight_formats=_TRANSFORMERS_FORMATS,
    compute_dtypes=frozenset({"float32", "bfloat16"}),
    features=_OF_TRANSFORMERS,
    # transformers' BitsAndBytesConfig has no block size.
    block_sizes={WeightFormat.NF4: (64,), WeightFormat.FP4: (64,)},
    levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8, "4bit": WeightFormat.NF4},
)

PEFT_BITSANDBYTES = _spec(
    "peft_bitsandbytes",
    "PEFT with bitsandbytes, stepped as transformers' Trainer does",
    "peft_trainer:PeftTrainer",
    _PEFT_CAPABILITIES,
    partial(_probe, "peft_bitsandbytes", ("torch", "transformers", "peft", "bitsandbytes")),
    gpu=False,
)

MLX_LM = _spec(
    "mlx_lm",
    "mlx-lm's own trainer and LoRA layers",
    "mlx_lm_trainer:MlxLmTrainer",
    Capabilities(
        weight_formats=frozenset(
            {WeightFormat.NONE, WeightFormat.MXFP4, WeightFormat.NVFP4, WeightFormat.MXFP8, *_AFFINE}
        ),
        compute_dtypes=frozenset({"float32", "bfloat16"}),
        features=_ON_EVERY_RIVAL,
        block_sizes={
            WeightFormat.MXFP4: (32,),
            WeightFormat.NVFP4: (16,),
            WeightFormat.MXFP8: (32,),
            **dict.fromkeys(_AFFINE, (64, 32, 128)),
        },
        levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8_AFFINE, "4bit": WeightFormat.INT4_AFFINE},
    ),
    partial(_probe, "mlx_lm", ("mlx", "mlx-lm")),
    gpu=False,
)

MLX_LM_SUMMED = replace(
    MLX_LM,
    name="mlx_lm_summed",
    title="mlx-lm's own trainer with a loss that sums over the window",
    trainer="benchmarks.rivals.mlx_lm_trainer:SummedTrainer",
)
"""Not what its users get: it shows what is left when mlx-lm's averages are put aside."""

UNSLOTH = _spec(
    "unsloth",
    "Unsloth, stepped as transformers' Trainer does",
    "unsloth_trainer:UnslothTrainer",
    Capabilities(
        weight_formats=frozenset({WeightFormat.NONE, WeightFormat.NF4}),
        compute_dtypes=frozenset({"bfloat16", "float16"}),
        features=(_OF_TRANSFORMERS - {Feature.PACKING}) | {Feature.PAGED_ADAMW, Feature.PAGED_ADAMW_8BIT},
        block_sizes={WeightFormat.NF4: (64,)},
        levels={"none": WeightFormat.NONE, "4bit": WeightFormat.NF4},
    ),
    partial(_probe, "unsloth", ("torch", "transformers", "peft", "bitsandbytes", "unsloth"), needs_gpu=True),
    gpu=True,
)
