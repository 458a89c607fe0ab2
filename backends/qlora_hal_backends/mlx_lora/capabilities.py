"""What this backend offers, as data. Nothing of MLX is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat
from qlora_hal.contract.memory_constants import MemoryConstants
from qlora_hal.formats.four_bit import BLOCK_SIZES

LOSS_CHUNK_ROWS = 1024
"""Rows of hidden states whose logits are made at a time."""

MLX_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "compile": ("auto", "off"),
    "command_buffers": ("auto", "small"),
    "tf32": ("off", "on"),
}
"""`backend.options`: `compile` off computes without `mx.compile`, for finding a fault in it. `command_buffers` small is
for a Mac whose display stutters, or whose watchdog ends a run: Metal then gets its work in smaller pieces. `tf32` on
lets a GPU that can multiply float32 with 10 bits of mantissa, which is MLX's own default and not what float32 says."""

MLX_ENVIRONMENT: Mapping[str, Mapping[object, Mapping[str, str]]] = {
    "command_buffers": {"small": {"MLX_MAX_OPS_PER_BUFFER": "4", "MLX_MAX_MB_PER_BUFFER": "10"}},
    "tf32": {"off": {"MLX_ENABLE_TF32": "0"}, "on": {"MLX_ENABLE_TF32": "1"}},
}
"""Read once by MLX, when it first opens the GPU; its defaults for buffers depend on the GPU, and are several times as
large."""


_OURS = "_QLORA_HAL_SET_FOR_MLX"
"""The variables that were set here, as `name=value,...`, for this process and the children that inherit them: one that
holds another value now is the user's."""


def set_environment(options: Mapping[str, object]) -> None:
    """Set the variables of `MLX_ENVIRONMENT` before MLX is imported.

    A choice that is asked for wins over a variable that the user has set; a default does not. What an earlier call set
    for other options is taken back.
    """
    marked = (pair.partition("=") for pair in os.environ.get(_OURS, "").split(",") if pair)
    ours = {name for name, _, value in marked if os.environ.get(name) == value}
    for option, choices in MLX_OPTIONS.items():
        settings = MLX_ENVIRONMENT.get(option, {})
        wanted = settings.get(options.get(option, choices[0]), {})
        for variable in {name for chosen in settings.values() for name in chosen}:
            is_users = variable in os.environ and variable not in ours
            if variable in wanted and (option in options or not is_users):
                os.environ[variable] = wanted[variable]
                ours.add(variable)
            elif variable in ours and variable not in wanted:
                del os.environ[variable]
                ours.discard(variable)
    os.environ[_OURS] = ",".join(f"{name}={os.environ[name]}" for name in sorted(ours))


@dataclass(frozen=True, slots=True)
class MLXFormat:
    """MLX's own words for a weight format. Group sizes: the first is the default."""

    mode: str
    bits: int
    group_sizes: tuple[int, ...]


_AFFINE_GROUPS = (64, 32, 128)
MLX_FORMATS: Mapping[WeightFormat, MLXFormat] = {
    WeightFormat.INT2_AFFINE: MLXFormat("affine", 2, _AFFINE_GROUPS),
    WeightFormat.INT3_AFFINE: MLXFormat("affine", 3, _AFFINE_GROUPS),
    WeightFormat.INT4_AFFINE: MLXFormat("affine", 4, _AFFINE_GROUPS),
    WeightFormat.INT5_AFFINE: MLXFormat("affine", 5, _AFFINE_GROUPS),
    WeightFormat.INT6_AFFINE: MLXFormat("affine", 6, _AFFINE_GROUPS),
    WeightFormat.INT8_AFFINE: MLXFormat("affine", 8, _AFFINE_GROUPS),
    WeightFormat.MXFP4: MLXFormat("mxfp4", 4, (32,)),
    WeightFormat.NVFP4: MLXFormat("nvfp4", 4, (16,)),
    WeightFormat.MXFP8: MLXFormat("mxfp8", 8, (32,)),
}

"""Those of bitsandbytes 0.50, whose bits these are."""

_FEATURES = frozenset(
    {
        Feature.DOUBLE_QUANT,
        Feature.QUANTIZE_ON_LOAD,
        Feature.LOAD_PREQUANTIZED,
        Feature.GRADIENT_CHECKPOINTING,
        Feature.LORA_DROPOUT,
        Feature.PACKING,
        Feature.PEAK_MEMORY,
        Feature.GENERATE,
        Feature.TOKEN_WEIGHTS,
        Feature.PAGED_ADAMW,
        Feature.DATA_PARALLEL,
        Feature.EXPERTS,
    }
)


def computes_on_a_cpu() -> bool:
    """Whether MLX has nothing but its CPU library here."""
    return sys.platform != "darwin" and not _installed("mlx-cuda-12", "mlx-cuda-13")


def _installed(*distributions: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    for distribution in distributions:
        try:
            version(distribution)
        except PackageNotFoundError:
            continue
        return True
    return False


IS_CPU = computes_on_a_cpu()
"""Only there are equal bits from equal starts claimed: one thread computes. Of Metal's and CUDA's kernels it is not
known."""

MLX_NOTES: Mapping[str, str] = {
    "paged_adamw": "paged_adamw is adamw here: MLX pages nothing",
    **({"bfloat16": "MLX emulates bfloat16 on a CPU: correct, but many times slower than float32"} if IS_CPU else {}),
}

MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3"})
"""Kinds of models whose experts are trained: those of `experts.FAMILIES`."""

CAPABILITIES = Capabilities(
    weight_formats=frozenset({WeightFormat.NONE, WeightFormat.NF4, *MLX_FORMATS}),
    compute_dtypes=frozenset({"bfloat16", "float32"}),
    features=_FEATURES | ({Feature.BITWISE_DETERMINISM} if IS_CPU else set()),
    block_sizes={WeightFormat.NF4: BLOCK_SIZES, **{f: known.group_sizes for f, known in MLX_FORMATS.items()}},
    levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8_AFFINE, "4bit": WeightFormat.INT4_AFFINE},
    families=MIXTURES,
)
MEMORY = MemoryConstants(
    cross_entropy_rows=LOSS_CHUNK_ROWS,
    attention_scores_kept=1.0,
    working_layers=2.25 if IS_CPU else 5.5,
    dequantized_copies=10,
)
"""MLX's attention keeps the scores of a layer for its gradient. The rest was measured, on a CPU with lengths of 32 to
1024 and on an NVIDIA H200: MLX queues several pieces of work, and what they read stays alive; on a GPU more of it."""
