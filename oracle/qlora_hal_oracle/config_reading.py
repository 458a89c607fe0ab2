"""From a Hugging Face `config.json` to the numbers of a model, for the architectures that the oracle computes.

A key means what transformers' code of that `model_type` makes of it; one that this code does not read has no effect.
What the code would read and the oracle does not compute raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .arrays import Float64
from .blocks import ACTIVATIONS
from .config_values import Config, integer, numbers, real, refuse_key
from .mixture_reading import mixture_of_deepseek, mixture_of_gpt_oss, mixture_of_mixtral, mixture_of_qwen
from .shape import DEFAULT_RMS_NORM_EPS, DEFAULT_ROPE_THETA, LlamaShape

Parts = dict[str, object]
"""Fields of `LlamaShape` that differ from a plain Llama's."""

SLIDING = "sliding_attention"


def read_shape(config: Config) -> LlamaShape:
    """Read a `config.json`; one without `model_type` is a Llama's.

    Raises ValueError for what the oracle does not compute.
    """
    family = str(config.get("model_type", "llama"))
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; the oracle computes {', '.join(FAMILIES)} only")
    sizes, parts = _sizes(config), FAMILIES[family](config)
    sizes |= {name: parts.pop(name) for name in sizes.keys() & parts.keys()}
    pairs = int(int(str(sizes["head_dim"])) * float(str(parts.get("rotary_share", 1.0)))) // 2
    return LlamaShape(**{**sizes, **_rotary(config, pairs), **parts})  # type: ignore[arg-type]


def _sizes(config: Config) -> Parts:
    hidden_size = integer(config, "hidden_size")
    heads = integer(config, "num_attention_heads")
    return {
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": integer(config, "intermediate_size"),
        "num_hidden_layers": integer(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer(config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", hidden_size // heads),
        "rms_norm_eps": real(config, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


# families -------------------------------------------------------------------------------------------------------------
def _llama(config: Config) -> Parts:
    return {
        "activation": _activation(config, "hidden_act"),
        **_biases(config),
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def _mistral(config: Config) -> Parts:
    # AutoConfig takes a Mistral with kinds of layers for a Ministral.
    refuse_key(config, "layer_types")
    window = integer(config, "sliding_window", 4096) if config.get("sliding_window", 4096) is not None else 0
    return {"activation": _activation(config, "hidden_act"), "windows": _everywhere(config, window)}


def _qwen2(config: Config) -> Parts:
    return {
        "activation": _activation(config, "hidden_act"),
        "query_key_value_bias": True,
        "windows": _windows_of_qwen(config),
        "head_dim": integer(config, "hidden_size") // integer(config, "num_attention_heads"),
    }


def _qwen3(config: Config) -> Parts:
    return {
        "activation": _activation(config, "hidden_act"),
        "query_key_norm": True,
        "windows": _windows_of_qwen(config),
        "head_dim": integer(config, "head_dim", 128),
        **_biases(config),
    }


def _gemma2(config: Config) -> Parts:
    return {
        **_gemma(config),
        "attention_softcap": _cap(config, "attn_logit_softcapping", 50.0),
        "logits_softcap": _cap(config, "final_logit_softcapping", 30.0),
        "windows": _windows_of_types(config, lambda layer: layer % 2 == 0),
    }


def _gemma3(config: Config) -> Parts:
    # transformers 5.23 hands no cap to this family's attention.
    refuse_key(config, "attn_logit_softcapping")
    _refuse_new_rope(config)
    every = integer(config, "sliding_window_pattern", 6)
    return {
        **_gemma(config),
        "query_key_norm": True,
        "logits_softcap": _cap(config, "final_logit_softcapping", None),
        "windows": _windows_of_types(config, lambda layer: (layer + 1) % every != 0),
        "rope_theta": real(config, "rope_theta", 1e6),
        "local_rope_theta": real(config, "rope_local_base_freq", 10000.0),
    }


def _gemma(config: Config) -> Parts:
    refuse_key(config, "use_bidirectional_attention")
    return {
        "activation": _activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "norms_around": True,
        "attention_scale": real(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "embedding_scale": integer(config, "hidden_size") ** 0.5,
        "head_dim": integer(config, "head_dim", 256),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
        **_biases(config),
    }


def _phi3(config: Config) -> Parts:
    kind = _rope_settings(config).get("rope_type", "default")
    if kind not in ("default", "longrope"):  # transformers takes the older names su and yarn for longrope here
        raise ValueError(f"rope_type is {kind!r}; the oracle computes default, longrope only for this model_type")
    window = config.get("sliding_window")
    return {
        "activation": _activation(config, "hidden_act"),
        "windows": _everywhere(config, 0 if window is None else integer(config, "sliding_window")),
        "rotary_share": real({**config, **_rope_settings(config)}, "partial_rotary_factor", 1.0),
        "rms_norm_eps": real(config, "rms_norm_eps", 1e-5),
        "fused_projections": True,
    }


def _granite(config: Config) -> Parts:
    return {
        **_llama(config),
        "attention_scale": real(config, "attention_multiplier", 1.0),
        "embedding_scale": real(config, "embedding_multiplier", 1.0),
        "residual_scale": real(config, "residual_multiplier", 1.0),
        "logits_scale": 1.0 / real(config, "logits_scaling", 1.0),
    }


def _mixtral(config: Config) -> Parts:
    window = integer(config, "sliding_window") if config.get("sliding_window") is not None else 0
    return {
        "activation": _activation(config, "hidden_act"),
        "windows": _everywhere(config, window),
        "rms_norm_eps": real(config, "rms_norm_eps", 1e-5),
        "rope_theta": _base_frequency(config, 1e6),
        "mixture": mixture_of_mixtral(config),
    }


def _qwen2_moe(config: Config) -> Parts:
    refuse_key(config, "use_sliding_window")
    return {
        "activation": _activation(config, "hidden_act"),
        "query_key_value_bias": bool(config.get("qkv_bias", True)),
        "mixture": mixture_of_qwen(config, shared=True),
    }


def _qwen3_moe(config: Config) -> Parts:
    window = integer(config, "sliding_window", 4096) if config.get("use_sliding_window") else 0
    return {
        "activation": _activation(config, "hidden_act"),
        "query_key_norm": True,
        "windows": _everywhere(config, window),
        "mixture": mixture_of_qwen(config, shared=False),
        **_biases(config),
    }


def _glm4_moe(config: Config) -> Parts:
    return {
        "activation": _activation(config, "hidden_act"),
        "query_key_value_bias": bool(config.get("attention_bias")),
        "query_key_norm": bool(config.get("use_qk_norm")),
        "rotary_share": real({**config, **_rope_settings(config)}, "partial_rotary_factor", 0.5),
        "rms_norm_eps": real(config, "rms_norm_eps", 1e-5),
        "mixture": mixture_of_deepseek(config),
    }


def _gpt_oss(config: Config) -> Parts:
    if not _rope_settings(config):
        raise ValueError("without rope_scaling transformers takes yarn for a gpt-oss; it has to be written down here")
    has_biases = bool(config.get("attention_bias", True))
    return {
        "query_key_value_bias": has_biases,
        "output_bias": has_biases,
        "attention_sinks": True,
        "windows": _windows_of_types({"sliding_window": 128, **config}, lambda layer: layer % 2 == 0),
        "head_dim": integer(config, "head_dim", 64),
        "rms_norm_eps": real(config, "rms_norm_eps", 1e-5),
        "rope_theta": _base_frequency(config, 150000.0),
        "mixture": mixture_of_gpt_oss(config),
    }


FAMILIES: Mapping[str, Callable[[Config], Parts]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
}
"""`model_type` -> what it does otherwise than a plain Llama, with transformers' own defaults."""


def _activation(config: Config, key: str, default: str = "silu") -> str:
    name = str(config.get(key) or default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; the oracle computes {', '.join(ACTIVATIONS)} only")
    return name


def _biases(config: Config) -> Parts:
    has = bool(config.get("attention_bias"))
    return {"query_key_value_bias": has, "output_bias": has}


def _cap(config: Config, key: str, default: float | None) -> float | None:
    return None if config.get(key, default) is None else real(config, key, default or 0.0)


# windows --------------------------------------------------------------------------------------------------------------
def _everywhere(config: Config, window: int) -> tuple[int, ...]:
    return (window,) * integer(config, "num_hidden_layers") if window else ()


def _windows_of_qwen(config: Config) -> tuple[int, ...]:
    if not config.get("use_sliding_window"):
        return ()
    first = integer(config, "max_window_layers", 28)
    return _windows_of_types(config, lambda layer: layer >= first)


def _windows_of_types(config: Config, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Layers by `layer_types`, or by the family's rule where config.json does not list them."""
    layers, types = integer(config, "num_hidden_layers"), config.get("layer_types")
    if config.get("sliding_window", 4096) is None:
        return ()
    window = integer(config, "sliding_window", 4096)
    sliding = [kind == SLIDING for kind in types] if isinstance(types, list) else [slides(n) for n in range(layers)]
    return tuple(window if slides_here else 0 for slides_here in sliding) if any(sliding) else ()


# rotary positions -----------------------------------------------------------------------------------------------------
def _rotary(config: Config, pairs: int) -> Parts:
    """`rotary_factors` and what belongs to them, for heads in which `pairs` pairs are turned."""
    settings = _rope_settings(config)
    theta = _base_frequency(config, DEFAULT_ROPE_THETA)
    kind = str(settings.get("rope_type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; the oracle computes {', '.join(ROPE_TYPES)} only")
    wavelengths = 2.0 * math.pi * theta ** (np.arange(pairs) / max(pairs, 1))
    return {"rope_theta": theta, **ROPE_TYPES[kind]({**config, **settings}, wavelengths)}


def _base_frequency(config: Config, default: float) -> float:
    settings = _rope_settings(config)
    return real(settings if "rope_theta" in settings else config, "rope_theta", default)


def _unscaled(settings: Config, wavelengths: Float64) -> Parts:
    return {}


def _linear(settings: Config, wavelengths: Float64) -> Parts:
    return {"rotary_factors": (real(settings, "factor"),) * len(wavelengths)}


def _llama3(settings: Config, wavelengths: Float64) -> Parts:
    """Long waves are stretched by `factor`, short ones not, those between by a mixture of frequencies (Llama 3.1)."""
    factor, length = real(settings, "factor"), real(settings, "original_max_position_embeddings")
    low, high = real(settings, "low_freq_factor"), real(settings, "high_freq_factor")
    kept = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return {"rotary_factors": _divisors(kept + (1.0 - kept) / factor)}


def _yarn(settings: Config, wavelengths: Float64) -> Parts:
    """A ramp over the pairs between those that turn `beta_fast` and `beta_slow` times (arXiv:2309.00071)."""
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        refuse_key(settings, key)
    factor, length = real(settings, "factor"), real(settings, "original_max_position_embeddings")
    pairs, theta = len(wavelengths), real(settings, "rope_theta", DEFAULT_ROPE_THETA)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(length / (times * 2.0 * math.pi)) / math.log(theta)

    first, last = (
        pair_that_turns(real(settings, "beta_fast", 32.0)),
        pair_that_turns(real(settings, "beta_slow", 1.0)),
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - first) / (last - first or 0.001), 0.0, 1.0)
    magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return {"rotary_factors": _divisors(1.0 - stretched + stretched / factor), "rotary_magnitude": magnitude}


def _longrope(settings: Config, wavelengths: Float64) -> Parts:
    """A factor for each pair, of two sets: up to the original length, and beyond it (arXiv:2402.13753)."""
    refuse_key(settings, "attention_factor")
    original = integer(settings, "original_max_position_embeddings")
    factor = settings.get("factor") or integer(settings, "max_position_embeddings") / original
    beyond = float(str(factor)) > 1.0
    return {
        "rotary_factors": numbers(settings, "short_factor"),
        "long_rotary_factors": numbers(settings, "long_factor"),
        "rotary_original_length": original,
        "rotary_magnitude": math.sqrt(1.0 + math.log(float(str(factor))) / math.log(original)) if beyond else 1.0,
    }


ROPE_TYPES: Mapping[str, Callable[[Config, Float64], Parts]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _divisors(multipliers: Float64) -> tuple[float, ...]:
    return tuple(float(number) for number in 1.0 / multipliers)


def _rope_settings(config: Config) -> Config:
    # transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` at the top and `rope_scaling` when there was one.
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            return {"rope_type": settings.get("type", "default"), **settings}
    return {}


def _refuse_new_rope(config: Config) -> None:
    """Where layers of two kinds have rotary positions of their own, the names of transformers 4 alone are read."""
    if config.get("rope_parameters") is not None:
        raise ValueError("rope_parameters for kinds of layers are not read here; rope_theta and rope_scaling are")
