"""What a `config.json` says of a mixture of experts, with transformers' own defaults of each architecture."""

from __future__ import annotations

from collections.abc import Callable

from .blocks import GPT_OSS_SLOPE
from .config_values import Config, integer, real
from .shape import MixtureShape


def mixture_of_mixtral(config: Config) -> MixtureShape:
    """Raises ValueError for noise on the router's input, which is no function of the model."""
    if config.get("router_jitter_noise"):
        raise ValueError(f"router_jitter_noise is {config['router_jitter_noise']!r}; the oracle does not compute it")
    return MixtureShape(
        experts=_experts(config, "num_local_experts", "num_experts", default=8),
        experts_per_token=integer(config, "num_experts_per_tok", 2),
        inner=integer(config, "intermediate_size"),
        path="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )


def mixture_of_qwen(config: Config, *, shared: bool) -> MixtureShape:
    """Qwen 2, which has a shared expert behind a gate, and Qwen 3, which has none."""
    plain = config.get("mlp_only_layers")
    plain_layers = plain if isinstance(plain, list) else []
    step = integer(config, "decoder_sparse_step", 1)
    return MixtureShape(
        experts=_experts(config, "num_experts", "num_local_experts", default=60 if shared else 128),
        experts_per_token=integer(config, "num_experts_per_tok", 4 if shared else 8),
        inner=integer(config, "moe_intermediate_size", 1408 if shared else 768),
        normalized=bool(config.get("norm_topk_prob", False)),
        shared="shared_expert" if shared else "",
        shared_inner=integer(config, "shared_expert_intermediate_size", 5632) if shared else 0,
        shared_gate="shared_expert_gate" if shared else "",
        layers=_layers(config, lambda layer: layer not in plain_layers and (layer + 1) % step == 0),
    )


def mixture_of_deepseek(config: Config) -> MixtureShape:
    """DeepSeek-V3's routing, as GLM-4 has it too."""
    inner, first = integer(config, "moe_intermediate_size", 1408), integer(config, "first_k_dense_replace", 1)
    return MixtureShape(
        experts=_experts(config, "n_routed_experts", "num_local_experts", default=128),
        experts_per_token=integer(config, "num_experts_per_tok", 8),
        inner=inner,
        scoring="sigmoid",
        normalized=bool(config.get("norm_topk_prob", True)),
        scaling=real(config, "routed_scaling_factor", 1.0),
        corrected=True,
        groups=integer(config, "n_group", 1),
        groups_chosen=integer(config, "topk_group", 1),
        shared="shared_experts",
        shared_inner=inner * integer(config, "n_shared_experts", 1),
        layers=_layers(config, lambda layer: layer >= first),
    )


def mixture_of_gpt_oss(config: Config) -> MixtureShape:
    """The softmax over the chosen experts alone is that over all, divided by its sum."""
    if real(config, "swiglu_alpha", GPT_OSS_SLOPE) != GPT_OSS_SLOPE:
        raise ValueError(f"swiglu_alpha is {config['swiglu_alpha']!r}; the oracle computes {GPT_OSS_SLOPE} only")
    return MixtureShape(
        experts=_experts(config, "num_local_experts", "num_experts", default=128),
        experts_per_token=integer(config, "num_experts_per_tok", 4),
        inner=integer(config, "intermediate_size", 2880),
        router_name="router",
        biased=True,
        limit=real(config, "swiglu_limit", 7.0),
        joined=True,
    )


def _experts(config: Config, key: str, other: str, *, default: int) -> int:
    """Under the name that the family writes, or the one that transformers gives it."""
    return integer(config, key, integer(config, other, default))


def _layers(config: Config, has_experts: Callable[[int], bool]) -> tuple[bool, ...]:
    """Empty where all have."""
    found = tuple(has_experts(layer) for layer in range(integer(config, "num_hidden_layers")))
    return () if all(found) else found
