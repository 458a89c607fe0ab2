"""How a checkpoint is already quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How a checkpoint is already quantized. `method` is `bitsandbytes`, `gptq`, `mlx` or
    `mxfp4`, which is transformers' word for the folders of gpt-oss."""

    method: str
    weight_format: str
    block_size: int | None
    double_quant: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)
