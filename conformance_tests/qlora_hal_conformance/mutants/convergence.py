"""Wrong runs for the convergence references, and an honest one: any backend, with one thing changed on the way to it.

Each trains, and none crashes: what is wrong shows in where the held-out loss ends, and nowhere else. Two end lower than
an honest run. `python -m qlora_hal_conformance.convergence --backend NAME --defect DEFECT` must refuse each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qlora_hal.contract.backend import Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.values import (
    Adapter,
    Batch,
    Float32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
)
from qlora_hal.model.source import ModelSource


class Altered(QuantizedLoRATrainer):
    """Another trainer's answers, unchanged. What is below changes one of them."""

    def __init__(self, inner: QuantizedLoRATrainer) -> None:
        self.spec = inner.spec  # type: ignore[misc]  # it stands in for whatever it is given
        self.inner = inner

    def proved_compute_dtypes(self) -> Sequence[str]:
        return self.inner.proved_compute_dtypes()

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        self.inner.load(source, quantization, compute)

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return self.inner.linear_modules()

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        self.inner.attach(adapter, optimizer)

    def device_facts(self) -> DeviceFacts:
        return self.inner.device_facts()

    def close(self) -> None:
        self.inner.close()

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        return self.inner.train_step(window, settings)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return self.inner.evaluate(batches)

    def export_adapter(self) -> Adapter:
        return self.inner.export_adapter()

    def export_optimizer(self) -> OptimizerSnapshot:
        return self.inner.export_optimizer()

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        self.inner.import_optimizer(snapshot)

    def logits(self, batch: Batch) -> Float32:
        return self.inner.logits(batch)

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        return self.inner.gradients(window)

    def dequantized_weight(self, module: str) -> Float32:
        return self.inner.dequantized_weight(module)


class LearningRateTenthHigher(Altered):
    """Ends lower than an honest run while the loss still falls."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        return super().train_step(window, replace(settings, learning_rate=1.1 * settings.learning_rate))


class LearningRateTenthLower(Altered):
    """Ends higher."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        return super().train_step(window, replace(settings, learning_rate=0.9 * settings.learning_rate))


class NoBiasCorrection(Altered):
    """AdamW without its bias correction, which is a factor of the rate (epsilon aside)."""

    steps = 0

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        self.steps = 0
        super().attach(adapter, optimizer)

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.steps += 1
        factor = (1 - settings.beta1**self.steps) / math.sqrt(1 - settings.beta2**self.steps)
        rate, decay = settings.learning_rate * factor, settings.weight_decay / factor
        return super().train_step(window, replace(settings, learning_rate=rate, weight_decay=decay))


class RowsSeenTwice(Altered):
    """Each window is trained on twice: twice the work, and a lower loss."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        super().train_step(window, settings).resolve()
        return super().train_step(window, settings)


class TwiceAlpha(Altered):
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        config = replace(adapter.config, alpha=2.0 * adapter.config.alpha)
        super().attach(Adapter(adapter.tensors, config), optimizer)


class SumsReversed(Altered):
    """Honest: the micro-batches of a window from its end, and the rows of each. Every sum over tokens runs the other
    way; the masks go with their rows."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        return super().train_step([_rows_reversed(batch) for batch in reversed(window)], settings)


def _rows_reversed(batch: Batch) -> Batch:
    return Batch(
        batch.input_ids[::-1].copy(),
        batch.labels[::-1].copy(),
        batch.position_ids[::-1].copy(),
        batch.segment_ids[::-1].copy(),
        rows=None if batch.rows is None else batch.rows[::-1].copy(),
    )


DEFECTS: Mapping[str, Callable[[QuantizedLoRATrainer], Altered]] = {
    "learning_rate_tenth_higher": LearningRateTenthHigher,
    "learning_rate_tenth_lower": LearningRateTenthLower,
    "no_bias_correction": NoBiasCorrection,
    "rows_seen_twice": RowsSeenTwice,
    "twice_alpha": TwiceAlpha,
}
HONEST: Mapping[str, Callable[[QuantizedLoRATrainer], Altered]] = {"sums_reversed": SumsReversed}
