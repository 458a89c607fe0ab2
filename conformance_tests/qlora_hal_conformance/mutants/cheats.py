"""Backends that know the suite: they answer from memory instead of computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_hal.values import Batch, Float32
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

from .registry import Mutant, with_trainer


class AnswersFromMemory(ReferenceTrainer):
    """The first logits of each shape are given again for every other batch of that shape."""

    def logits(self, batch: Batch) -> Float32:
        remembered: dict[tuple[int, ...], Float32] = self.__dict__.setdefault("remembered", {})
        if batch.input_ids.shape not in remembered:
            remembered[batch.input_ids.shape] = super().logits(batch)
        return remembered[batch.input_ids.shape].copy()


class GradientsFromMemory(ReferenceTrainer):
    """The first gradients are given again whatever the adapter has become."""

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        if "remembered" not in self.__dict__:
            self.remembered = super().gradients(window)
        return {name: gradient.copy() for name, gradient in self.remembered.items()}


MUTANTS = (
    Mutant(
        "logits_from_memory",
        "Gives the first logits of each shape again for every batch of that shape.",
        ("30", "31"),
        with_trainer(AnswersFromMemory),
    ),
    Mutant(
        "gradients_from_memory",
        "Gives the first gradients again for every window.",
        ("31", "41"),
        with_trainer(GradientsFromMemory),
    ),
)
