"""Tiny random-weight models of each architecture, written as a hub would hold them. Tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, VOCABULARY = 64, 128, 2, 4, 2, 320

SMALL_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0},
}

OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {"num_hidden_layers": 4, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4,
              "num_experts_per_tok": 2, "num_dense_layers": 1, "sliding_window": 8},
    "cohere": {},
    "cwm": {"sliding_window": 8},
    "cohere2": {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                    "v_head_dim": 16},
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 8},
    "falcon_h1": {"head_dim": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "mamba_chunk_size": 8},
    # Its tower for pictures as small as it goes.
    "gemma3": {"boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302, "mm_tokens_per_image": 4,
               "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
    "glm": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
                 "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_bigcode": {"n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"intermediate_size": 256},
    "granite": {},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8,
              "mamba_dt_rank": 4},
    "ministral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "nemotron": {"head_dim": 16},
    "olmo": {},
    "olmoe": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
                  "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "seed_oss": {},
    "smollm3": {"pad_token_id": 0},
    "starcoder2": {"sliding_window": 8},
}  # fmt: skip
"""Further architectures, which only some tests look at."""


def write_model(folder: Path, family: str = "llama", seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A random model whose logits spread like a trained one's (weights ten times the usual initial size)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL_TEXT, **{**FAMILIES, **OTHERS}[family], **changes})
    config.initializer_range = 0.15
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start at 1 and 0: move them, or a wrong one would not show
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(1.0)
        move_corrections(model)
    model.save_pretrained(folder)
    return folder


def move_corrections(model: Any) -> None:
    """Of routers, by which experts are chosen: they start at 0."""
    import torch

    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
