"""Gradient checkpointing (Chen et al. 2016) of decoder layers, on the instances: no class is patched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from qlora_hal_backends.mlx_lora.experts import FrozenExperts
from qlora_hal_backends.mlx_lora.lora_linear import FrozenLinear, LoRASlots


class RecomputedLayer:
    """Stands in a model's list of layers for one of them; recomputes it in backward while `slots.recompute` is set.

    Everything else that the model asks of a layer is answered by the layer itself.
    """

    def __init__(self, layer: Module, linears: Sequence[FrozenLinear | FrozenExperts], slots: LoRASlots) -> None:
        self._layer = layer
        self._linears = linears
        self._slots = slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        slots = self._slots
        if not slots.recompute:
            return self._layer(*arguments, **named)
        places = [linear.place for linear in self._linears if linear.place is not None]
        names = [name for place in places for name in (place.a_name, place.b_name)]
        words = slots.token_words  # backward runs this again after the slots were emptied

        # What a gradient flows to must be an argument; the rest (words, weights) may be captured.
        def forward(tensors: Sequence[mx.array], *arguments: Any, **named: Any) -> Any:
            with slots.holding(dict(zip(names, tensors, strict=True)), token_words=words):
                return self._layer(*arguments, **named)

        return mx.checkpoint(forward)([slots.tensors[name] for name in names], *arguments, **named)
