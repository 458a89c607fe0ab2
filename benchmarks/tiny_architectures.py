"""Tiny random models of every architecture that transformers and mlx-lm both have, for `mlx_architectures.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320

_SMALL: dict[str, Any] = {
    # No square: some models multiply by the root of the hidden size, and round it.
    "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 8,
    # GPT-2's words
    "n_embd": 96, "n_inner": 384, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256, "rotary_dim": 8,
    # mixtures of experts
    "moe_intermediate_size": 32, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "shared_expert_intermediate_size": 32, "moe_num_experts": 4,
    "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    # state spaces and linear attention
    "state_size": 8, "d_state": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 24, "mamba_d_ssm": 192,
    "mamba_n_groups": 1, "mamba_expand": 2, "mamba_num_heads": 8, "mamba_head_dim": 24, "ssm_state_size": 8,
    "n_groups": 1, "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_chunk_size": 8, "chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "lru_width": 96, "block_auto_adjust_ff_dim": False,
    # Gemma
    "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip

_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_FOUR = {"num_hidden_layers": 4}
_SIX = {"num_hidden_layers": 6}
_EVERY_SECOND = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    # As many layers as it takes to have one of each kind.
    **dict.fromkeys(
        ("afmoe", "cohere2", "exaone4", "exaone_moe", "mellum", "olmo3", "olmo_hybrid", "qwen3_5",
         "qwen3_5_moe", "qwen3_next", "smollm3"),
        _FOUR,
    ),
    **dict.fromkeys(("gemma3_text", "gemma4", "gemma4_text", "gemma4_unified"), _SIX),
    "gemma3": {
        **_SIX, "boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302, "mm_tokens_per_image": 4,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
    },
    **dict.fromkeys(("lfm2", "lfm2_moe"), _EVERY_SECOND),
    "jamba": {
        **_FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "granitemoehybrid": {**_FOUR, "layer_types": ["mamba", "attention"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8, "num_key_value_heads": 1},
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"), _LATENT
    ),
    "deepseek_v2": {**_LATENT, "rope_parameters": _YARN},
    # mlx-lm leaves its window out, so longer rows are refused.
    "gemma2": {**_FOUR, "sliding_window": 32},
    "nemotron_h": {"sliding_window": None},
    "gpt_neox": {"intermediate_size": 384},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "mamba": {"intermediate_size": None},
    "mamba2": {"num_heads": 8, "head_dim": 24},
}  # fmt: skip


def model_types() -> tuple[str, ...]:
    """Those that transformers has as a causal language model and mlx-lm has a module for, in transformers' order."""
    from importlib.util import find_spec

    from mlx_lm.utils import MODEL_REMAPPING

    return tuple(
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}") is not None
    )


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' own model in float32, random, in evaluation; norms and biases are moved, or a wrong one would not
    show. `changes` are keys of its configuration."""
    config_class = CONFIG_MAPPING[model_type]
    wanted = {**_SMALL, **_CHANGES.get(model_type, {}), **changes}
    known = config_class().to_dict()
    nested = known.get("text_config")
    names = {*known, *getattr(config_class, "attribute_map", {}), *changes}
    settings = {name: value for name, value in wanted.items() if name in names and value is not None}
    if isinstance(nested, dict):
        settings["text_config"] = {key: value for key, value in wanted.items() if key in nested and value is not None}
    config = config_class(**settings)
    config.initializer_range = 0.15
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
