"""Backends that lose something of what is not all at hand at one time: a layer's bytes, some rows of a long batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import EXACT, Arithmetic, OracleLlama
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.llama import ForwardPass

from .registry import Mutant, with_rooms, with_trainer


class ReadsAStaleSlot(OracleLlama):
    """Backward goes on before a layer's bytes have come: what stands in its slot is the layer above."""

    def backward(
        self,
        forward: ForwardPass,
        grad_logits: Float64,
        arithmetic: Arithmetic = EXACT,
        *,
        with_base: bool = False,
    ) -> dict[str, Float64]:
        arrived = self.base
        self.base = {name: arrived.get(_of_the_layer_above(name), weight) for name, weight in arrived.items()}
        try:
            return super().backward(forward, grad_logits, arithmetic, with_base=with_base)
        finally:
            self.base = arrived


def _of_the_layer_above(name: str) -> str:
    """The packed weight that stood in a weight's slot before it; the name itself for what is in no slot."""
    parts = name.split(".")
    if "layers" not in parts or "proj" not in name:
        return name
    number = parts.index("layers") + 1
    return ".".join([*parts[:number], str(int(parts[number]) + 1), *parts[number + 1 :]])


class LosesATile(ReferenceTrainer):
    """Where activations are recomputed, the second tile of a row adds nothing to the feed-forward's gradients."""

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        whole = super().gradient_of(window, divisor, masks_of)
        if not self.compute.gradient_checkpointing:
            return whole
        first_tile = super().gradient_of([_first_half(batch) for batch in window], divisor, masks_of)
        kept = {name: (first_tile if ".mlp." in name else whole).gradients[name] for name in whole.gradients}
        return replace(whole, gradients=kept)


def _first_half(batch: Batch) -> Batch:
    labels = batch.labels.copy()
    labels[:, np.arange(labels.shape[1]) >= labels.shape[1] // 2] = IGNORE_LABEL
    return replace(batch, labels=labels)


MUTANTS = (
    Mutant(
        "stale_streamed_layer",
        "Differentiates each layer with the weights of the layer above, which its slot still holds.",
        ("31",),
        with_rooms(model=ReadsAStaleSlot),
    ),
    Mutant(
        "tile_lost_in_recomputation",
        "Adds the feed-forward's gradients of each row's first half alone where activations are recomputed.",
        ("31",),
        with_trainer(LosesATile),
    ),
)
