"""Drawn models of the families that people train: a `config.json` as the hub has it, with sizes and settings drawn.

A family is a function from a generator to a config.json; `read_shape` says what it means. Caps, windows and scales are
drawn so that they matter on rows of twenty tokens: a cap of 30 does not show at 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Config = dict[str, object]
Random = np.random.Generator

HIDDEN = 384
LAYOUTS = ((6, 2), (12, 4), (12, 2))
"""(query heads, key heads): groups of 3 and 6, never one key head alone. They divide HIDDEN, as transformers asks, and
all together are a multiple of 128 wide: whole blocks and groups in each row."""


def draw_config(family: str, random: Random) -> Config:
    """The config.json of a model of the family."""
    return {**FAMILIES, **MIXTURES}[family](random)


def _drawn(random: Random, model_type: str, architecture: str, *, head_dim_written: bool = True) -> Config:
    """Sizes that differ in each run. Where the head's size is written down, all heads together are twice as wide as the
    residual stream; else as wide."""
    heads, key_heads = LAYOUTS[int(random.integers(len(LAYOUTS)))]
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": int(random.integers(290, 420)),
        "hidden_size": HIDDEN,
        "intermediate_size": int(random.choice((256, 384))),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(random.choice((1e-6, 1e-5, 1e-3))),
        "rope_theta": float(random.choice((500.0, 10000.0, 1e6))),
        "tie_word_embeddings": bool(random.integers(2)),
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {**config, "head_dim": 2 * HIDDEN // heads} if head_dim_written else config


def _llama(random: Random) -> Config:
    return _drawn(random, "llama", "LlamaForCausalLM")


def _llama3(random: Random) -> Config:
    """Waves longer than the first 64 positions are stretched, those shorter than 16 are not."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(random.choice((8.0, 32.0))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {**_llama(random), "rope_theta": 5e5, "rope_scaling": scaling}


def _mistral(random: Random) -> Config:
    return {**_drawn(random, "mistral", "MistralForCausalLM"), "sliding_window": _window(random)}


def _qwen2(random: Random) -> Config:
    return {
        **_drawn(random, "qwen2", "Qwen2ForCausalLM", head_dim_written=False),
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
    }


def _qwen3(random: Random) -> Config:
    return {
        **_drawn(random, "qwen3", "Qwen3ForCausalLM"),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
    }


def _gemma2(random: Random) -> Config:
    return {
        **_gemma(random, "gemma2", "Gemma2ForCausalLM"),
        "attn_logit_softcapping": float(random.uniform(1.5, 4.0)),
        "final_logit_softcapping": float(random.uniform(1.5, 4.0)),
    }


def _gemma3(random: Random) -> Config:
    return {
        **_gemma(random, "gemma3_text", "Gemma3ForCausalLM"),
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": float(random.choice((200.0, 10000.0))),
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }


def _gemma(random: Random, model_type: str, architecture: str) -> Config:
    return {
        **_drawn(random, model_type, architecture),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(random.choice((20, 48, 112))),
        "sliding_window": _window(random),
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def _phi3(random: Random) -> Config:
    config = _drawn(random, "phi3", "Phi3ForCausalLM", head_dim_written=False)
    share = 0.75
    pairs = int(HIDDEN // int(str(config["num_attention_heads"])) * share) // 2
    return {
        **config,
        "partial_rotary_factor": share,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            # Eighths: exact in every dtype.
            "short_factor": [float(eighths) / 8 for eighths in random.integers(8, 25, pairs)],
            "long_factor": [float(eighths) / 8 for eighths in random.integers(16, 240, pairs)],
        },
        "sliding_window": _window(random),
    }


def _granite(random: Random) -> Config:
    return {
        **_drawn(random, "granite", "GraniteForCausalLM", head_dim_written=False),
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": float(random.uniform(4.0, 12.0)),
        "residual_multiplier": float(random.uniform(0.2, 0.5)),
        "attention_multiplier": float(random.uniform(0.04, 0.08)),
        "logits_scaling": float(random.uniform(3.0, 8.0)),
    }


def _mixtral(random: Random) -> Config:
    return {
        **_drawn(random, "mixtral", "MixtralForCausalLM", head_dim_written=False),
        "intermediate_size": 128,
        "num_local_experts": int(random.integers(4, 7)),
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }


def _qwen2_moe(random: Random) -> Config:
    return {
        **_drawn(random, "qwen2_moe", "Qwen2MoeForCausalLM", head_dim_written=False),
        **_experts_of_qwen(random),
        "use_sliding_window": False,
        "shared_expert_intermediate_size": 256,
        "norm_topk_prob": False,
    }


def _qwen3_moe(random: Random) -> Config:
    return {
        **_drawn(random, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **_experts_of_qwen(random),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "norm_topk_prob": True,
    }


def _experts_of_qwen(random: Random) -> Config:
    return {
        "moe_intermediate_size": 128,
        "num_experts": int(random.integers(5, 9)),
        "num_experts_per_tok": int(random.integers(2, 4)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }


def _glm4_moe(random: Random) -> Config:
    """One layer without experts, one with; of four groups of two experts the two best are open to a token."""
    return {
        **_drawn(random, "glm4_moe", "Glm4MoeForCausalLM"),
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(random.choice((1.5, 2.5))),
        "num_nextn_predict_layers": 0,
    }


def _gpt_oss(random: Random) -> Config:
    """Two key heads at least, windows in the first of its layers, experts and routers with biases."""
    return {
        **_drawn(random, "gpt_oss", "GptOssForCausalLM"),
        "intermediate_size": 128,
        "num_local_experts": int(random.integers(4, 7)),
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "sliding_window": _window(random),
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "output_router_logits": False,
    }


FAMILIES: Mapping[str, Callable[[Random], Config]] = {
    "llama": _llama,
    "llama3": _llama3,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
}

MIXTURES: Mapping[str, Callable[[Random], Config]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
}
"""Families with experts. Their names are their `model_type`."""

MODEL_TYPES: Mapping[str, str] = {**{name: name for name in FAMILIES}, "llama3": "llama", "gemma3": "gemma3_text"}
"""The `model_type` of each family."""


@dataclass(frozen=True, slots=True)
class Variation:
    """A family with single keys of its config.json changed."""

    family: str
    keys: Mapping[str, object]


_OF_OTHERS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 7}
_SCALES_OF_OTHERS = {"embedding_multiplier": 5.0, "residual_multiplier": 0.3, "logits_scaling": 3.0, "logit_scale": 0.2}

VARIATIONS: Mapping[str, Variation] = {
    "attention_bias": Variation("llama", {"attention_bias": True}),
    "mlp_bias": Variation("llama", {"mlp_bias": True}),
    "gelu": Variation("llama", {"hidden_act": "gelu"}),
    "gelu_tanh": Variation("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": Variation("llama", {"hidden_act": "relu"}),
    "rope_linear": Variation("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "rope_yarn": Variation(
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}}
    ),
    "window_of_another_family": Variation("llama", {"sliding_window": 5, "use_sliding_window": True}),
    "caps_of_another_family": Variation("llama", _OF_OTHERS),
    "scales_of_another_family": Variation("llama", _SCALES_OF_OTHERS),
    "no_window": Variation("mistral", {"sliding_window": None}),
    "windows_from_a_layer_on": Variation("qwen2", {"use_sliding_window": True, "sliding_window": 6}),
    "biases_of_qwen3": Variation("qwen3", {"attention_bias": True}),
    "other_activation_of_gemma": Variation("gemma2", {"hidden_activation": "gelu"}),
    "cap_of_gemma3": Variation("gemma3", {"final_logit_softcapping": 2.0}),
    "unscaled_phi3": Variation("phi3", {"rope_scaling": None, "partial_rotary_factor": 0.5}),
    "biases_of_granite": Variation("granite", {"attention_bias": True, "mlp_bias": True}),
}
"""Each is computed as its architecture's code computes it, or refused. A key that this code does not read changes
nothing."""

VARIATIONS_OF_MIXTURES: Mapping[str, Variation] = {
    "weights_not_normalised": Variation("qwen3_moe", {"norm_topk_prob": False}),
    "weights_normalised": Variation("qwen2_moe", {"norm_topk_prob": True}),
    "experts_in_every_second_layer": Variation("qwen3_moe", {"decoder_sparse_step": 2}),
    "a_layer_without_experts": Variation("qwen2_moe", {"mlp_only_layers": [1]}),
    "experts_in_all_layers": Variation("glm4_moe", {"first_k_dense_replace": 0}),
    "one_group": Variation("glm4_moe", {"n_group": 1, "topk_group": 1}),
    "sigmoid_not_normalised": Variation("glm4_moe", {"norm_topk_prob": False, "use_qk_norm": False}),
    "two_shared_experts": Variation("glm4_moe", {"n_shared_experts": 2}),
    "window_of_mixtral": Variation("mixtral", {"sliding_window": 6}),
    "one_expert_a_token": Variation("mixtral", {"num_experts_per_tok": 1}),
    "gates_at_their_limit": Variation("gpt_oss", {"swiglu_limit": 0.75}),
}
"""The same of families with experts."""


def vary(name: str, random: Random) -> Config:
    """The config.json of a variation."""
    variation = {**VARIATIONS, **VARIATIONS_OF_MIXTURES}[name]
    return {**draw_config(variation.family, random), **variation.keys}


def _window(random: Random) -> int:
    return int(random.integers(5, 10))
