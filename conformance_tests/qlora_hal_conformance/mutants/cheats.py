"""Backends that know the suite: they answer from memory instead of computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.values import Batch, Float32, PendingStep, StepSettings
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.random_inputs import stream
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.random_models import SHAPES, UNEVEN_SHAPE, draw_tensors

from .loss import mean_of_means
from .registry import Mutant, with_trainer

PUBLISHED_SEED = 0
PUBLISHED_MODELS = ("main", "tied", "uneven", "second", "large")


def published_tensors(shape: LlamaShape, name: str) -> dict[str, Float32]:
    """The weights that the suite draws from its seed 0; the first draw of a model is its shape."""
    random = stream(PUBLISHED_SEED, f"model/{name}")
    if shape != UNEVEN_SHAPE:
        random.integers(len(SHAPES))
    return draw_tensors(shape, random)


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


class KnowsThePublishedModel(ReferenceTrainer):
    """Was made to pass a published run: it computes with the weights of seed 0 whatever the folder holds."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        for name, tensor in published_tensors(self.base.shape, "main").items():
            self.base.weights[name] = tensor.astype(np.float64)


class HonestForSeedZeroOnly(ReferenceTrainer):
    """Computes rightly on the inputs of seed 0, which it knows by heart, and carelessly on all others."""

    def logits(self, batch: Batch) -> Float32:
        honest = super().logits(batch)
        return honest if self._is_published() else honest.astype(np.float16).astype(np.float32)

    def _is_published(self) -> bool:
        shape = self.base.shape
        embedding = self.base.weights["model.embed_tokens.weight"]
        for name in PUBLISHED_MODELS:
            known = published_tensors(shape, name)["model.embed_tokens.weight"]
            if np.array_equal(known[0], embedding[0]):
                return True
        return False


class RightForShow(ReferenceTrainer):
    """Everything that can be looked at is right; the step itself averages means."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        shown, self.rooms = self.rooms, replace(self.rooms, window_gradient=mean_of_means)
        try:
            return super().train_step(window, settings)
        finally:
            self.rooms = shown


MUTANTS = (
    Mutant(
        "right_for_show",
        "Shows the right gradients and trains with others.",
        ("31", "40", "95"),
        with_trainer(RightForShow),
    ),
    Mutant(
        "knows_the_published_model",
        "Computes with the model of the suite's seed 0 whatever it is given.",
        ("20", "30"),
        with_trainer(KnowsThePublishedModel),
    ),
    Mutant(
        "answers_seed_0_only",
        "Computes in float32 on the inputs of seed 0 and in float16 on all others.",
        ("30",),
        with_trainer(HonestForSeedZeroOnly),
    ),
    Mutant(
        "logits_from_memory",
        "Gives the first logits of each shape again for every batch of that shape.",
        ("30", "31"),
        with_trainer(AnswersFromMemory),
    ),
    Mutant(
        "gradients_from_memory",
        "Gives the first gradients again for every window.",
        ("31", "41", "95"),
        with_trainer(GradientsFromMemory),
    ),
)
