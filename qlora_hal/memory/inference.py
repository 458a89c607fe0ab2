"""The memory of answering: weights, and the keys and values of every token that was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.memory.estimate import DTYPE_BYTES, weight_bytes
from qlora_hal.model.facts import text_config
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
    """2 x layers x key heads x head size x length x bytes, for each sequence, as transformers' caches are: a layer with
    a sliding window keeps its window, one with latents (DeepSeek) keeps them in place of keys and values, one that
    shares another's keeps none. A layer without attention keeps a state that does not grow, which is not counted.

    Families whose windows config.json does not tell apart are counted whole, which is never too little.
    """
    config = text_config(facts.config)
    layers, width = decoder_shape(facts).layers, _cached_width(facts)
    kept = [min(length, most) for most in _tokens_kept(config, layers)]
    own = layers - (_number(config, "num_kv_shared_layers") or 0)
    return int(sequences * DTYPE_BYTES[compute_dtype] * width * sum(kept[:own]))


def _cached_width(facts: ModelFacts) -> int:
    """Numbers that a layer keeps of a token."""
    config = text_config(facts.config)
    latent, rotary = _number(config, "kv_lora_rank"), _number(config, "qk_rope_head_dim")
    return latent + rotary if latent and rotary else 2 * decoder_shape(facts).key_value


def _tokens_kept(config: Mapping[str, object], layers: int) -> Iterator[float]:
    """How many tokens each layer keeps at most: `math.inf` where it keeps all, 0 without attention."""
    window, chunk = _number(config, "sliding_window"), _number(config, "attention_chunk_size")
    of_kind = {
        "sliding_attention": window - 1 if window else math.inf,  # and the token that is computed
        "chunked_attention": chunk - 1 if chunk else math.inf,
        "full_attention": math.inf,
        "attention": math.inf,
    }
    kinds = config.get("layer_types")
    for number in range(layers):
        if isinstance(kinds, list) and number < len(kinds):
            yield 0 if kinds[number] in _WITHOUT_ATTENTION else of_kind.get(str(kinds[number]), math.inf)
        else:
            yield of_kind["sliding_attention" if _slides(config, number) else "full_attention"]


def _slides(config: Mapping[str, object], number: int) -> bool:
    """Whether a layer has the window, in families whose config.json may leave `layer_types` out."""
    family = str(config.get("model_type", ""))
    if family in _ALL_SLIDE:
        return True
    if family == "qwen3_moe":  # its `max_window_layers` counts for nothing
        return config.get("use_sliding_window") is True
    if family in _FROM_A_LAYER_ON:
        most = _number(config, "max_window_layers") or 28
        return config.get("use_sliding_window") is True and number >= most
    pattern = _number(config, "sliding_window_pattern") or _PATTERNS.get(family)
    return pattern is not None and (number + 1) % pattern != 0


_ALL_SLIDE = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})
_FROM_A_LAYER_ON = frozenset({"qwen2", "qwen2_moe", "qwen3"})
_PATTERNS: Mapping[str, int] = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "gpt_oss": 2}
"""Each so many-th layer sees all; the defaults of transformers' configurations."""
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe"})


def _number(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int and value > 0 else None


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
