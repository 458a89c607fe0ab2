"""A small random model of any architecture that transformers has for causal language modeling, with drawn settings.

Sizes are shrunk by the names that configurations use for them. What varies inside a family is drawn: rotary kinds,
windows, norms of heads, biases, activations, caps, multipliers, tied heads. Tests and benchmarks only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiny_models import move_corrections

VOCABULARY = 320

_SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group n_shared_experts moe_num_shared_experts num_nextn_predict_layers",
    64: "hidden_size n_embd d_model embed_dim dim emb_dim embedding_size embed_size word_embed_proj_dim lru_width "
    "decoder_hidden_size input_embedding_size output_embedding_size hidden_dim",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim dim_ff "
    "feed_forward_size intermediate_dim shared_intermediate_size dense_intermediate_size intermediate_size_mlp "
    "mlp_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size expert_dim "
    "moe_shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth n_groups "
    "num_encoder_layers num_experts_per_tok num_experts_per_token num_key_value_heads moe_topk top_k_experts "
    "num_kv_heads mamba_n_groups num_encoder_blocks",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_encoder_attention_heads num_decoder_attention_heads "
    "linear_num_value_heads linear_num_key_heads mamba_n_heads mamba_num_heads moe_num_primary_experts",
    16: "head_dim q_lora_rank kv_lora_rank v_head_dim attention_head_size d_kv linear_key_head_dim image_size "
    "linear_value_head_dim mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size index_head_dim",
    8: "qk_nope_head_dim qk_rope_head_dim sliding_window attention_window_size mamba_chunk_size chunk_size rotary_dim "
    "hidden_size_per_layer_input local_attention attention_chunk_size time_step_rank patch_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length max_target_positions "
    "initial_context_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

_ROTARY: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
)  # fmt: skip
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
CHOICES: dict[str, tuple[Any, ...]] = {
    "hidden_act": _ACTIVATIONS, "hidden_activation": _ACTIVATIONS, "activation_function": _ACTIVATIONS[1:4],
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False), "mlp_bias": (True, False), "use_bias": (True, False), "bias": (True, False),
    "use_qkv_bias": (True, False), "use_qk_norm": (True, False), "qk_layernorm": (True, False),
    "logit_scale": (0.1, 4.0), "logits_scaling": (0.25, 8.0), "lm_head_multiplier": (0.1, 3.0),
    "final_logit_softcapping": (5.0, 30.0), "attn_logit_softcapping": (5.0, 50.0),
    "embedding_multiplier": (0.5, 5.0), "residual_multiplier": (0.3, 2.0), "attention_multiplier": (0.1, 0.5),
    "attention_in_multiplier": (0.5, 2.0), "key_multiplier": (0.5, 2.0), "mlp_multiplier": (0.5, 2.0),
    "clip_qkv": (0.5, 3.0), "sliding_window": (4, 8), "use_sliding_window": (True, False),
    "partial_rotary_factor": (0.25, 0.5), "rotary_pct": (0.25, 1.0), "query_pre_attn_scalar": (16, 32),
    "num_key_value_heads": (1, 2, 4), "multi_query": (True, False), "new_decoder_architecture": (True, False),
    "parallel_attn": (True, False), "alibi": (True, False), "use_parallel_residual": (True, False),
    "parallel_residual": (True, False), "do_layer_norm_before": (True, False), "scale_embedding": (True, False),
    "normalize_before": (True, False), "scale_attn_by_inverse_layer_idx": (True, False),
    "layer_norm_eps": (1e-5, 1e-3), "rms_norm_eps": (1e-6, 1e-3), "norm_topk_prob": (True, False),
    "dropout": (0.1,), "attention_dropout": (0.1,), "resid_pdrop": (0.1,), "embd_pdrop": (0.1,),
    "hidden_dropout": (0.1,),
}  # fmt: skip
"""Settings that change the forward pass, or would in training, with values to draw from."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4, "head_dim": 8}, "axk2": {"num_key_value_heads": 4, "head_dim": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2},
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_group": 1, "num_experts_per_tok": 2, "n_group": 1},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16, "first_k_dense_replace": 1},
    "deepseek_v32": {"num_key_value_heads": 4, "head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm_moe_dsa": {"num_key_value_heads": 4, "head_dim": 8},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "lm_head_multiplier": 0.1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "expert_layer_period": 9},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "feed_forward_size": 96,
        "attn_layers": ["local", "local"], "local_attn_chunk_length": 20,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32, "is_decoder": True},
    "xlstm": {"num_blocks": 2, "embedding_dim": 64},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "zamba2": {"mamba_d_state": 16, "n_mamba_heads": 8, "layers_block_type": ["linear_attention", "hybrid"]},
}  # fmt: skip
"""Where shrinking by names does not give a model that fits together, or would leave its kind of layer out."""


def model_types() -> tuple[str, ...]:
    """Every `model_type` that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def drawn_settings(model_type: str, seed: int) -> dict[str, Any]:
    """Settings beside the sizes: none for seed 0, else about half of those that the architecture has."""
    from transformers import CONFIG_MAPPING

    if seed == 0:
        return {}
    generator = random.Random(f"{model_type} {seed}")
    known = CONFIG_MAPPING[model_type]().to_dict()
    known = {**known, **(known.get("text_config") or {})}
    drawn = {
        name: generator.choice(values)
        for name, values in CHOICES.items()
        if name in known and generator.random() < 0.5 and not isinstance(known[name], dict)
    }
    rotary = known.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary and generator.random() < 0.7:
        kept = {key: value for key, value in rotary.items() if key == "partial_rotary_factor"}
        drawn["rope_parameters"] = {**generator.choice(_ROTARY), **kept}
    return drawn


def small_config(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The configuration of `model_type` with small sizes and `changes`."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    config = _shrunk(kind().to_dict())
    changed = {**OVERRIDES.get(model_type, {}), **(changes or {})}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = _with_layers({**text, **{k: v for k, v in changed.items() if k in text}})
    config = _with_layers({**config, **changed})
    return kind.from_dict(config)


def write_drawn_model(folder: Path, model_type: str, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
    """A random float32 model, saved as transformers saves it; returns it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_config(model_type, changes), dtype=torch.float32).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > 60_000_000:
        raise ValueError("the model did not become small")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:  # norms and biases start at 1 and 0: a wrong one must show
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(2.0)  # attention that starts almost uniform hides what is done to it
        move_corrections(model)
    model.save_pretrained(folder)
    return model


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_shrunk_items(config))


def _shrunk_items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("config"):
            yield name, _with_layers(_shrunk(value))
        elif type(value) is int and name in SMALL and value > 0:
            yield name, SMALL[name]
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            yield name, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[name]
        else:
            yield name, value


def _with_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Lists of one entry for each layer, as long as there are layers, with each kind of layer kept once."""
    count = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), None)
    if not isinstance(count, int):
        return config
    if layers := config.get("per_layer_config"):  # what one kind of layer has otherwise: heads twice as wide, here
        other = {name: SMALL.get(name, value) for name, value in next(iter(layers.values())).items()}
        config["per_layer_config"] = {"01": {**other, **({"head_dim": 32} if "head_dim" in other else {})}}
    for name, value in config.items():
        if isinstance(value, list) and name in SMALL:
            config[name] = [SMALL[name]] * count
        elif (
            isinstance(value, list) and len(value) > count and ("layer" in name or "block" in name or "pattern" in name)
        ):
            kinds = list(dict.fromkeys(map(str, value)))
            first = {kind: next(entry for entry in value if str(entry) == kind) for kind in kinds}
            config[name] = ([first[kind] for kind in kinds] + value)[:count]
    return config
