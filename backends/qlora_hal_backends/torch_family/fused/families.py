"""transformers' decoder layers in the words of the schedule: a record each, and what is read from a loaded model by it.

Classes are named, not guessed: a layer that differs in one line would be computed wrong without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.loading import BaseModel

Groups = Mapping[str, tuple[str, ...]]

NO_ROTARY = "none"
"""Of layers that turn nothing (SmolLM3's every fourth)."""

ATTENTION: Groups = {
    "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
}
SEPARATE: Groups = {
    **ATTENTION,
    "feed_forward_in": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward_out": ("mlp.down_proj",),
}
JOINED: Groups = {
    **SEPARATE,
    "attention_in": ("self_attn.qkv_proj",),
    "feed_forward_in": ("mlp.gate_up_proj",),
}


SHARED_EXPERT: Groups = {
    "shared_in": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_out": ("mlp.shared_expert.down_proj",),
}
SHARED_EXPERTS: Groups = {
    "shared_in": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_out": ("mlp.shared_experts.down_proj",),
}
"""Several of them are one, as wide as they are together."""


class Activation(Enum):
    """Of the gate in the feed-forward product."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


class Window(Enum):
    """Which layers have the sliding window that config.json names. As transformers' masks have it: modules beside them
    may hold another one (SmolLM3's heed `use_sliding_window`, its mask does not)."""

    NONE = "none"
    EVERY_LAYER = "every layer"
    BY_TYPE = "those that layer_types calls sliding_attention"


@dataclass(frozen=True, slots=True)
class Experts:
    """Of layers whose feed-forward is of experts: the class of their `mlp`, that of layers among them whose own is
    dense, and the groups of the expert that every token goes to, with the linear layer that weighs it."""

    block: str
    dense: str | None = None
    shared: Groups = field(default_factory=dict)
    shared_gate: str | None = None


@dataclass(frozen=True, slots=True)
class LayerFamily:
    """norm, attention, add, norm, gated product, add. Names are of modules below a layer; `groups` are those of a dense
    layer.

    `attention_norm` and `feed_forward_norm` are applied to a branch before it is added. `counts_from_one`: a norm
    multiplies with 1 + its weight. `norms_heads_jointly`: queries are normed over all heads at once, and so are keys.
    """

    groups: Groups
    middle_norm: str = "post_attention_layernorm"
    attention_norm: str | None = None
    feed_forward_norm: str | None = None
    counts_from_one: bool = False
    norms_heads_jointly: bool = False
    experts: Experts | None = None
    window: Window = Window.NONE

    def has_experts(self, layer: Any) -> bool:
        return self.experts is not None and type(layer.mlp).__name__ == self.experts.block

    def groups_of(self, layer: Any) -> Groups:
        """The projections of one layer that read the same input, experts' stacks left out."""
        if self.experts is None or not self.has_experts(layer):
            return self.groups
        return {**ATTENTION, **self.experts.shared}

    def window_of(self, attention: Any) -> int | None:
        """The sliding window of one layer."""
        config = attention.config
        if self.window is Window.NONE:
            return None
        if self.window is Window.BY_TYPE and config.layer_types[attention.layer_idx] != "sliding_attention":
            return None
        return None if config.sliding_window is None else int(config.sliding_window)

    def norm_weight(self, norm: Any) -> Tensor:
        """What a norm's result is multiplied with, rounded nowhere."""
        weight: Tensor = norm.weight.detach()
        return 1.0 + weight.float() if self.counts_from_one else weight


LLAMA = LayerFamily(SEPARATE)
MISTRAL = LayerFamily(SEPARATE, window=Window.EVERY_LAYER)
QWEN_2 = LayerFamily(SEPARATE, window=Window.BY_TYPE)
GEMMA = LayerFamily(SEPARATE, counts_from_one=True)
GEMMA_3 = LayerFamily(
    SEPARATE,
    middle_norm="pre_feedforward_layernorm",
    attention_norm="post_attention_layernorm",
    feed_forward_norm="post_feedforward_layernorm",
    counts_from_one=True,
    window=Window.BY_TYPE,
)

FAMILIES: Mapping[str, LayerFamily] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": MISTRAL,
    "Qwen2DecoderLayer": QWEN_2,
    "Qwen3DecoderLayer": QWEN_2,
    "MinistralDecoderLayer": QWEN_2,
    "SmolLM3DecoderLayer": QWEN_2,
    "SeedOssDecoderLayer": LLAMA,
    "CwmDecoderLayer": QWEN_2,
    "GraniteDecoderLayer": LLAMA,  # its multipliers are read from the layer and from the body
    "Phi3DecoderLayer": LayerFamily(JOINED, window=Window.EVERY_LAYER),
    "Qwen3MoeDecoderLayer": LayerFamily(
        SEPARATE, experts=Experts("Qwen3MoeSparseMoeBlock", dense="Qwen3MoeMLP"), window=Window.EVERY_LAYER
    ),
    "Qwen2MoeDecoderLayer": LayerFamily(
        SEPARATE,
        experts=Experts("Qwen2MoeSparseMoeBlock", "Qwen2MoeMLP", SHARED_EXPERT, "mlp.shared_expert_gate"),
        window=Window.BY_TYPE,
    ),
    "MixtralDecoderLayer": LayerFamily(SEPARATE, experts=Experts("MixtralSparseMoeBlock"), window=Window.EVERY_LAYER),
    "Glm4MoeDecoderLayer": LayerFamily(SEPARATE, experts=Experts("Glm4MoeMoE", "Glm4MoeMLP", SHARED_EXPERTS)),
    "OlmoeDecoderLayer": LayerFamily(SEPARATE, norms_heads_jointly=True, experts=Experts("OlmoeSparseMoeBlock")),
    "GemmaDecoderLayer": GEMMA,
    "Gemma2DecoderLayer": GEMMA_3,
    "Gemma3DecoderLayer": GEMMA_3,
}


def family_of(base: BaseModel) -> LayerFamily:
    layers: Any = base.layers
    return FAMILIES[type(layers[0]).__name__]


def epsilon_of(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def activation_of(base: BaseModel) -> Activation | None:
    """By what it computes: its name differs between versions and families. None: neither of ours, or several."""
    layers: Any = base.layers
    kinds = {family_of(base).has_experts(layer): layer.mlp for layer in layers}
    found = {_activation_in(mlp, has_experts) for has_experts, mlp in kinds.items()}
    return found.pop() if len(found) == 1 else None


def _activation_in(mlp: Any, has_experts: bool) -> Activation | None:
    x = torch.linspace(-6, 6, 97)
    if has_experts:
        y = mlp.experts.gated(x, torch.ones_like(x))
    else:
        y = (mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn)(x)
    if torch.allclose(y, torch.nn.functional.silu(x), rtol=1e-5, atol=1e-6):
        return Activation.SILU
    # The exact GELU differs from this one by up to 5e-4.
    if torch.allclose(y, torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6):
        return Activation.GELU_TANH
    return None


def embedding_scale_of(base: BaseModel) -> float:
    """What the body multiplies embeddings with after its embedding layer."""
    body: Any = base.body
    if hasattr(body, "embedding_multiplier"):
        return float(body.embedding_multiplier)
    if not family_of(base).counts_from_one or hasattr(body.embed_tokens, "embed_scale"):
        return 1.0
    return float(base.causal.config.get_text_config().hidden_size ** 0.5)


def head_width_of(base: BaseModel) -> int:
    layers: Any = base.layers
    return int(layers[0].self_attn.head_dim)


def rotary_of(attention: Any) -> str:
    """Which rotary embedding a layer has: that of its type, the only one (""), or none."""
    if not getattr(attention, "use_rope", True):
        return NO_ROTARY
    return getattr(attention, "layer_type", None) or ""


def rotary_kinds(base: BaseModel) -> Mapping[str, str | None]:
    """The kind of rotary embedding by type of layer; one entry "" where all are alike."""
    kinds = getattr(base.body.rotary_emb, "rope_type", None)
    return kinds if isinstance(kinds, Mapping) else {"": kinds}
