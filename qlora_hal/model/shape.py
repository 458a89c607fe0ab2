"""The sizes of a decoder that decide its activation memory, read from config.json under any family's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.model.expert_stacks import PER_TOKEN_KEYS
from qlora_hal.model.facts import LARGEST_SIZE, text_config

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Widths in elements per token. `query` is that of queries over all heads, `key_value` that of keys (and of
    values). Of a mixture each token goes to `routed` experts of `routed_width`, and `feed_forward` is of what sees
    every token."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    query: int
    key_value: int
    routed: int = 0
    routed_width: int = 0


def decoder_shape(facts: ModelFacts) -> DecoderShape:
    """Sizes from config.json; what it does not say comes from the linear layers' shapes."""
    config = text_config(facts.config)
    inputs = [shape.inputs for shape in facts.linear_modules.values()]
    outputs = [shape.outputs for shape in facts.linear_modules.values()]
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim") or min(inputs, default=0)
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or _numbered_blocks(facts)
    heads = _first(config, "num_attention_heads", "n_head", "n_heads") or 1
    key_value_heads = _first(config, "num_key_value_heads") or heads
    head_size = _first(config, "head_dim") or hidden // heads
    feed_forward = _first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    stacks = [shape for shape in facts.linear_modules.values() if shape.experts > 1]
    return DecoderShape(
        layers=layers,
        hidden=hidden,
        feed_forward=_dense_width(facts, layers) if stacks else feed_forward or max([4 * hidden, *outputs]),
        heads=heads,
        query=heads * head_size,
        key_value=key_value_heads * head_size,
        routed=_first(config, *PER_TOKEN_KEYS) or 1 if stacks else 0,
        routed_width=max((min(shape.inputs, shape.outputs) for shape in stacks), default=0),
    )


def weights_to_each(facts: ModelFacts) -> float:
    """How many weights of linear layers there are for each that a token is multiplied with: more than one of a mixture,
    where it meets some experts alone."""
    routed = decoder_shape(facts).routed
    shapes = facts.linear_modules.values()
    met = sum(shape.parameters * min(routed or 1, shape.experts) / shape.experts for shape in shapes)
    return sum(shape.parameters for shape in shapes) / met if met else 1.0


def _dense_width(facts: ModelFacts, layers: int) -> int:
    """Of a mixture's gated layers that see every token (shared experts, the first layers of some), an average."""
    gates = [
        shape.outputs
        for path, shape in facts.linear_modules.items()
        if shape.experts == 1 and path.endswith((".gate_proj", ".w1"))
    ]
    return sum(gates) // max(layers, 1)


def _first(config: Mapping[str, object], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value < LARGEST_SIZE), None)


def _numbered_blocks(facts: ModelFacts) -> int:
    numbers = {int(part) for name in facts.tensors for part in name.split(".") if part.isdigit()}
    return max(numbers, default=-1) + 1
