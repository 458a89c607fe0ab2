"""The numbers that define a decoder of the Llama kind: a plain Llama, and what its relatives do otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
INPUT_NORM, POST_ATTENTION_NORM = "input_layernorm", "post_attention_layernorm"
PRE_MLP_NORM, POST_MLP_NORM = "pre_feedforward_layernorm", "post_feedforward_layernorm"
SINKS = "self_attn.sinks"
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureShape:
    """Layers whose feed-forward part is a mixture of experts (arXiv:1701.06538, arXiv:2401.04088).

    - `path` is its module in a decoder layer; `gate`, `up`, `down` are the names of an expert's linear layers;
    - `scoring` of the router's logits, "softmax" over all experts or "sigmoid";
    - `normalized`: the weights of the chosen experts are divided by their sum, then multiplied with `scaling`;
    - `corrected`: a bias of each expert is added to its score for the choice, and to no weight (DeepSeek-V3);
    - of `groups` of neighbouring experts only those in the `groups_chosen` best can be chosen (DeepSeek-V3);
    - `shared` is the module of an expert that every token passes, `shared_inner` wide, with `shared_gate` that of a
      sigmoid that multiplies what it gives (Qwen 2); no name, no such expert;
    - `layers`: which have a mixture, the others an MLP; empty for all;
    - `biased`: router and experts add biases; `limit` cuts gate and up, which are then gated as gpt-oss gates them;
    - `joined`: checkpoints have all experts of a block in one tensor, `[experts, in, out]`, gate and up in turns.
    """

    experts: int
    experts_per_token: int
    inner: int
    path: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    scoring: str = "softmax"
    normalized: bool = True
    scaling: float = 1.0
    corrected: bool = False
    groups: int = 1
    groups_chosen: int = 1
    shared: str = ""
    shared_inner: int = 0
    shared_gate: str = ""
    layers: tuple[bool, ...] = ()
    router_name: str = "gate"
    biased: bool = False
    limit: float | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.experts * self.groups_chosen // self.groups:
            raise ValueError(
                f"{self.experts_per_token} of {self.experts} experts in {self.groups_chosen} of {self.groups} groups "
                "are to be chosen for a token"
            )
        if self.experts % self.groups:
            raise ValueError(f"{self.experts} experts cannot form {self.groups} groups of one size")

    @property
    def router(self) -> str:
        """The router, by its name in a decoder layer."""
        return f"{self.path}.{self.router_name}"

    @property
    def correction(self) -> str:
        """The bias of the choice."""
        return f"{self.router}.e_score_correction_bias"

    @property
    def shared_gate_path(self) -> str:
        return f"{self.path}.{self.shared_gate}"

    def expert(self, part: str) -> str:
        """The stack of all experts' "gate", "up" or "down", by its name in a decoder layer."""
        return f"{self.path}.experts.{getattr(self, part)}"

    def shared_expert(self, part: str) -> str:
        """The shared expert's "gate", "up" or "down"."""
        return f"{self.path}.{self.shared}.{getattr(self, part)}"

    def linears(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """What can carry adapters: (experts, outputs, inputs) of the stacks, (outputs, inputs) of the shared expert."""
        found = {self.expert(part): (self.experts, *sides) for part, sides in _parts(self.inner, hidden).items()}
        if self.shared:
            found |= {self.shared_expert(part): sides for part, sides in _parts(self.shared_inner, hidden).items()}
        return found

    def routers(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that decides about tokens, by its name in a decoder layer."""
        found: dict[str, tuple[int, ...]] = {f"{self.router}.weight": (self.experts, hidden)}
        if self.biased:
            found[f"{self.router}.bias"] = (self.experts,)
        if self.corrected:
            found[self.correction] = (self.experts,)
        if self.shared_gate:
            found[f"{self.shared_gate_path}.weight"] = (1, hidden)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes and constants; names as in Hugging Face's `LlamaConfig` where it has them.

    Everything after `tie_word_embeddings` is what a plain Llama does not have, and its default is a plain Llama:

    - `activation` of the gate, by Hugging Face's name;
    - biases of the projections to queries, keys and values, of the one behind attention, and of the MLP's;
    - `query_key_norm`: a norm of each query and key head before it is turned (Qwen 3, Gemma 3);
    - `norm_offset`: norms multiply by offset + weight (1 in Gemma);
    - `norms_around`: a norm before and one behind attention and MLP (Gemma 2 and 3);
    - `attention_scale` of the scores, by default head_dim^(-1/2);
    - soft caps c: x becomes c tanh(x / c);
    - `windows`: for each layer how many tokens a token sees, itself included, 0 for all; empty for all in every layer;
    - `local_rope_theta`: the rotary base of layers with a window, which have no scaled positions then (Gemma 3);
    - `rotary_share` of the head that is turned; `rotary_factors` divide the frequency of each pair, and
      `long_rotary_factors` do so where a batch has more than `rotary_original_length` positions; `rotary_magnitude`
      multiplies sine and cosine;
    - scales of the embeddings, of what each branch adds, and of the logits (all of them factors);
    - `fused_projections`: queries, keys and values are one linear layer, gate and up another (Phi-3);
    - `attention_sinks`: a score of each query head that takes its share of the softmax and gives nothing (gpt-oss);
    - `mixture`: layers with experts in place of the MLP.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = DEFAULT_ROPE_THETA
    rms_norm_eps: float = DEFAULT_RMS_NORM_EPS
    tie_word_embeddings: bool = False
    activation: str = "silu"
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    norm_offset: float = 0.0
    norms_around: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    windows: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    rotary_share: float = 1.0
    rotary_factors: tuple[float, ...] = ()
    long_rotary_factors: tuple[float, ...] = ()
    rotary_original_length: int = 0
    rotary_magnitude: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    fused_projections: bool = False
    attention_sinks: bool = False
    mixture: MixtureShape | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key heads evenly"
            )
        if self.rotary_size % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        if len(self.windows) not in (0, self.num_hidden_layers):
            raise ValueError(f"{len(self.windows)} layers have a window or none, of {self.num_hidden_layers}")
        for factors in (self.rotary_factors, self.long_rotary_factors):
            if len(factors) not in (0, self.rotary_size // 2):
                raise ValueError(f"{len(factors)} rotary factors for {self.rotary_size // 2} pairs")
        if self.mixture is not None and len(self.mixture.layers) not in (0, self.num_hidden_layers):
            raise ValueError(f"{len(self.mixture.layers)} layers have experts or none, of {self.num_hidden_layers}")

    @property
    def queries_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_size(self) -> int:
        """All query heads side by side."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """All key heads, or all value heads, side by side."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head are turned; they are its first."""
        return int(self.head_dim * self.rotary_share)

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def pre_mlp_norm(self) -> str:
        """In Gemma 2 and 3 the name that Llama gives it is that of the norm behind attention."""
        return PRE_MLP_NORM if self.norms_around else POST_ATTENTION_NORM

    def window(self, layer: int) -> int:
        """How many tokens a token sees in this layer; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def mixture_of(self, layer: int) -> MixtureShape | None:
        """The experts of a layer; None where it has an MLP."""
        has = self.mixture is not None and (not self.mixture.layers or self.mixture.layers[layer])
        return self.mixture if has else None

    def layer_linears(self, layer: int) -> dict[str, tuple[int, ...]]:
        """(outputs, inputs) of every linear layer of a decoder layer that can carry an adapter, by its name there, in
        the order of the pass; (experts, outputs, inputs) of a stack of experts."""
        hidden, queries, keys = self.hidden_size, self.query_size, self.key_size
        mixture = self.mixture_of(layer)
        if self.fused_projections:
            attention = {"self_attn.qkv_proj": (queries + 2 * keys, hidden)}
        else:
            attention = {
                f"self_attn.{n}_proj": (size, hidden) for n, size in (("q", queries), ("k", keys), ("v", keys))
            }
        feed_forward = self._mlp() if mixture is None else mixture.linears(hidden)
        return {**attention, "self_attn.o_proj": (hidden, queries), **feed_forward}

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        if self.fused_projections:
            return {"mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)}
        return {f"mlp.{part}_proj": sides for part, sides in _parts(inner, hidden).items()}

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer of a decoder layer has one."""
        if not linear.startswith("self_attn."):
            return self.mlp_bias or (self.mixture is not None and self.mixture.biased)
        return self.output_bias if linear == "self_attn.o_proj" else self.query_key_value_bias

    def layer_norms(self) -> dict[str, int]:
        """Width of every norm of a decoder layer, by its name there."""
        names = (INPUT_NORM, POST_ATTENTION_NORM) + ((PRE_MLP_NORM, POST_MLP_NORM) if self.norms_around else ())
        of_heads = (QUERY_NORM, KEY_NORM) if self.query_key_norm else ()
        return {**dict.fromkeys(names, self.hidden_size), **dict.fromkeys(of_heads, self.head_dim)}

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint must have; a stack of experts is one tensor here."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size),
            f"{FINAL_NORM}.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            path = f"model.layers.{layer}"
            mixture = self.mixture_of(layer)
            if mixture is not None:
                shapes |= {f"{path}.{name}": sides for name, sides in mixture.routers(self.hidden_size).items()}
            for name, sides in self.layer_linears(layer).items():
                shapes[f"{path}.{name}.weight"] = sides
                if self.has_bias(name):
                    shapes[f"{path}.{name}.bias"] = sides[:-1]
            if self.attention_sinks:
                shapes[f"{path}.{SINKS}"] = (self.num_attention_heads,)
            shapes |= {f"{path}.{name}.weight": (width,) for name, width in self.layer_norms().items()}
        return shapes


def _parts(inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) of the three linear layers of a gated feed-forward part, in the order of the pass."""
    return {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
