"""Mixtures of experts in mlx-lm's models: routing by the contract's rule, frozen experts with adapters.

mlx-lm promises nothing of equal scores, and in Qwen2-MoE reads no `norm_topk_prob`. So the block around its
`switch_mlp` is ours; router and shared expert stay mlx-lm's own modules. Every expert computes as `FrozenLinear` does:
the adapter's product is added before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import silu
from mlx.nn.layers.base import Module

from qlora_hal.model.facts import text_config
from qlora_hal_backends.mlx_lora.config_reading import Config
from qlora_hal_backends.mlx_lora.expert_weights import StackedWeight
from qlora_hal_backends.mlx_lora.lora_linear import LoRAPlace, LoRASlots
from qlora_hal_backends.mlx_lora.routing import Routing, sigmoid_routing, softmax_routing


@dataclass(frozen=True, slots=True)
class ExpertFamily:
    """How a kind of model has its experts: the block's name in a decoder layer, how config.json says where tokens go,
    and the hub's names of an expert's gate, up and down projection."""

    block: str
    routing: Callable[[Config], Routing]
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


FAMILIES: Mapping[str, ExpertFamily] = {
    "mixtral": ExpertFamily("block_sparse_moe", partial(softmax_routing, normalized=True), ("w1", "w3", "w2")),
    "qwen2_moe": ExpertFamily("mlp", softmax_routing),
    "qwen3_moe": ExpertFamily("mlp", softmax_routing),
    "glm4_moe": ExpertFamily("mlp", sigmoid_routing),
    "deepseek_v3": ExpertFamily("mlp", sigmoid_routing),
}
"""By `model_type`: the mixtures whose experts are trained here."""


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """One layer's mixture, as mlx-lm built it. `stacks` are the canonical paths of gate, up and down."""

    layer: Any
    attribute: str
    path: str
    stacks: tuple[str, str, str]

    @property
    def built(self) -> Any:
        return getattr(self.layer, self.attribute)


def expert_blocks(causal: Any, model_type: str) -> Iterator[ExpertBlock]:
    """The mixtures of a model whose family is known here, in the order of its layers."""
    family = FAMILIES.get(model_type)
    for index, layer in enumerate(causal.layers if family is not None else ()):
        assert family is not None
        if hasattr(getattr(layer, family.block, None), "switch_mlp"):
            path = f"model.layers.{index}.{family.block}"
            gate, up, down = (f"{path}.experts.{projection}" for projection in family.projections)
            yield ExpertBlock(layer, family.block, path, (gate, up, down))


def put_experts(block: ExpertBlock, experts: tuple[FrozenExperts, FrozenExperts, FrozenExperts], read: Config) -> None:
    """Frozen experts and our routing in the place of mlx-lm's block. `read` is config.json as transformers reads it."""
    config = text_config(read)
    routing = FAMILIES[str(config["model_type"])].routing(config)
    setattr(block.layer, block.attribute, RoutedExperts(block.built, experts, routing))


SHARED, SHARED_GATE = "shared_experts", "shared_expert_gate"
KEPT = ("gate", "shared_expert", SHARED_GATE, SHARED)
"""Modules of mlx-lm's block that stay."""


class FrozenExperts:
    """The packed, frozen weights of a stack, plus the adapters once they are attached; no module itself, as
    `FrozenLinear` is none."""

    def __init__(self, base: StackedWeight, slots: LoRASlots) -> None:
        self.base = base
        self.slots = slots
        self.place: LoRAPlace | None = None

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """`[rows, in]` to `[rows, out]`, each row through its expert `[rows]`; rows in the order of their experts."""
        rows = x.astype(mx.float32)[:, None]
        y = self.base.product(rows, experts)
        if self.place is not None and self.slots.enabled:
            a, b = self.slots.tensors[self.place.a_name], self.slots.tensors[self.place.b_name]
            low_rank = _gathered(rows, a, experts) * self.place.scale
            y = y + _gathered(low_rank, b, experts)
        return y[:, 0].astype(x.dtype)


def _gathered(rows: mx.array, matrices: mx.array, experts: mx.array) -> mx.array:
    product: mx.array = mx.gather_mm(rows, matrices.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True)
    return product


class RoutedExperts(Module):
    """y = sum over the chosen experts of weight * down(silu(gate(x)) * up(x)), and the shared expert's where there is
    one, times the sigmoid of its gate where it has one."""

    def __init__(
        self, block: Any, experts: tuple[FrozenExperts, FrozenExperts, FrozenExperts], routing: Routing
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in KEPT:
            if name in block:
                setattr(self, name, block[name])
        self.stacks, self.routing = FrozenStacks(*experts), routing

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self._routed(tokens)
        y = (self.stacks(tokens, chosen) * weights[..., None].astype(x.dtype)).sum(axis=1).reshape(x.shape)
        if SHARED_GATE in self:
            y = y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        elif SHARED in self:
            y = y + self.shared_experts(x)
        return y.astype(x.dtype)

    def _routed(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        if not self.routing.is_sigmoid:
            return self.routing(self.gate(tokens))
        # transformers makes these logits in float32, whatever the model's dtype.
        logits = tokens.astype(mx.float32) @ self.gate.weight.astype(mx.float32).T
        return self.routing(logits, self.gate.e_score_correction_bias)


@dataclass(frozen=True, slots=True)
class FrozenStacks:
    """An expert's three projections, for all experts of a block."""

    gate: FrozenExperts
    up: FrozenExperts
    down: FrozenExperts

    def __call__(self, tokens: mx.array, chosen: mx.array) -> mx.array:
        """`[tokens, hidden]` through the experts `[tokens, k]`: `[tokens, k, hidden]`. No token is dropped.

        Each token is there once for each of its experts, in the order of experts: a permutation, so that no gradient is
        summed in an order that a device chooses.
        """
        count, each = chosen.shape
        of_pairs = chosen.reshape(-1)
        order = mx.argsort(of_pairs)
        experts = of_pairs[order].astype(mx.uint32)
        repeated = mx.broadcast_to(tokens[:, None], (count, each, tokens.shape[-1])).reshape(count * each, -1)
        rows = repeated[order]
        y = self.down(silu(self.gate(rows, experts)) * self.up(rows, experts), experts)
        return y[mx.argsort(order)].reshape(count, each, -1)
