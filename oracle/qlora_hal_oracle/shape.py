"""The numbers that define a decoder of the Llama kind: a plain Llama, and what its relatives do otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
INPUT_NORM, POST_ATTENTION_NORM = "input_layernorm", "post_attention_layernorm"
PRE_MLP_NORM, POST_MLP_NORM = "pre_feedforward_layernorm", "post_feedforward_layernorm"
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"


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
    - `fused_projections`: queries, keys and values are one linear layer, gate and up another (Phi-3).
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

    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear layer of a decoder layer, by its name there, in the order of the pass."""
        hidden, inner, queries, keys = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        if self.fused_projections:
            attention = {"self_attn.qkv_proj": (queries + 2 * keys, hidden)}
            gates = {"mlp.gate_up_proj": (2 * inner, hidden)}
        else:
            attention = {
                f"self_attn.{n}_proj": (size, hidden) for n, size in (("q", queries), ("k", keys), ("v", keys))
            }
            gates = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        return {**attention, "self_attn.o_proj": (hidden, queries), **gates, "mlp.down_proj": (hidden, inner)}

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer of a decoder layer has one."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.output_bias if linear == "self_attn.o_proj" else self.query_key_value_bias

    def layer_norms(self) -> dict[str, int]:
        """Width of every norm of a decoder layer, by its name there."""
        names = (INPUT_NORM, POST_ATTENTION_NORM) + ((PRE_MLP_NORM, POST_MLP_NORM) if self.norms_around else ())
        of_heads = (QUERY_NORM, KEY_NORM) if self.query_key_norm else ()
        return {**dict.fromkeys(names, self.hidden_size), **dict.fromkeys(of_heads, self.head_dim)}

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint must have."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size),
            f"{FINAL_NORM}.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            path = f"model.layers.{layer}"
            for name, sides in self.layer_linears().items():
                shapes[f"{path}.{name}.weight"] = sides
                if self.has_bias(name):
                    shapes[f"{path}.{name}.bias"] = sides[:1]
            shapes |= {f"{path}.{name}.weight": (width,) for name, width in self.layer_norms().items()}
        return shapes
