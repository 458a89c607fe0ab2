"""The memory of answering: weights, and the keys and values of every token that was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.memory.estimate import DTYPE_BYTES, weight_bytes
from qlora_hal.model.shape import decoder_shape

if TYPE_CHECKING:
    from qlora_hal.contract.backend import Quantization
    from qlora_hal.contract.values import ComputeDtype
    from qlora_hal.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class InferenceMemory:
    """Bytes while `sequences` of `length` tokens are answered, all of them at their end."""

    sequences: int
    length: int
    weights: int
    cache: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.runtime


def kv_cache_bytes(facts: ModelFacts, sequences: int, length: int, compute_dtype: ComputeDtype) -> int:
    """2 x layers x key heads x head size x length x bytes, for each sequence. Layers with a sliding window may keep
    less; libraries differ in that."""
    shape = decoder_shape(facts)
    return 2 * shape.layers * shape.key_value * length * DTYPE_BYTES[compute_dtype] * sequences


def inference_memory(
    facts: ModelFacts,
    quantization: Quantization,
    compute_dtype: ComputeDtype,
    sequences: int,
    length: int,
    runtime_bytes: int,
) -> InferenceMemory:
    """Weights as they are stored, the cache, and what the device's runtime takes."""
    weights = weight_bytes(
        facts, quantization.weight_format, quantization.block_size, quantization.double_quant, compute_dtype
    )
    cache = kv_cache_bytes(facts, sequences, length, compute_dtype)
    return InferenceMemory(sequences, length, weights, cache, runtime_bytes)
