"""The numbers that define a Llama, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes and constants of a Llama; names as in Hugging Face's `LlamaConfig`."""

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

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    @property
    def queries_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LlamaShape:
        """Read a `config.json`. Raises ValueError for what the oracle does not compute."""
        _refuse_unknown_parts(config)
        hidden_size = _integer(config, "hidden_size")
        heads = _integer(config, "num_attention_heads")
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_integer(config, "num_key_value_heads", heads),
            head_dim=_integer(config, "head_dim", hidden_size // heads),
            rope_theta=_rope_theta(config),
            rms_norm_eps=_real(config, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _refuse_unknown_parts(config: Mapping[str, object]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act is {activation!r}; the oracle computes 'silu' only")
    rope_type = _rope_settings(config).get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"rope_type is {rope_type!r}; the oracle computes 'default' only")


def _rope_settings(config: Mapping[str, object]) -> Mapping[str, object]:
    # transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` at the top and `rope_scaling` when there was one.
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            return {"rope_type": settings.get("type", "default"), **settings}
    return {}


def _rope_theta(config: Mapping[str, object]) -> float:
    settings = _rope_settings(config)
    return _real(settings if "rope_theta" in settings else config, "rope_theta", DEFAULT_ROPE_THETA)


def _integer(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int):
        raise ValueError(f"config.json: {key} is {value!r}, an integer is needed")
    return value


def _real(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(f"config.json: {key} is {value!r}, a number is needed")
    return float(value)
