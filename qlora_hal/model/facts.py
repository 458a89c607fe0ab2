"""What can be known of a model without loading it: its config.json and the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor as a header declares it."""

    dtype: str
    shape: tuple[int, ...]
    byte_count: int
    file: str


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How a checkpoint is already quantized. `method` is `bitsandbytes`, `gptq` or `mlx`."""

    method: str
    weight_format: str
    block_size: int | None
    double_quant: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts for selection, memory and target modules.

    `linear_modules` maps module path -> (in, out) of every linear layer that can carry LoRA, the head left out, with
    the unpacked shapes of a pre-quantized checkpoint. `fingerprint` is a SHA-256 over the headers and samples of the
    contents: equal shapes with other weights differ.
    """

    architecture: str
    model_type: str
    config: Mapping[str, object]
    tensors: Mapping[str, TensorFacts]
    linear_modules: Mapping[str, tuple[int, int]]
    parameter_count: int
    fingerprint: str
    prequantized: Prequantized | None = None
    vocabulary_size: int = 0
    max_position_embeddings: int | None = None
