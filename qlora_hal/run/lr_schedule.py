"""Learning rate at a step: pure floats, one meaning on every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up to `peak`, then constant, linear to 0, or half a cosine to 0.

    Hugging Face's formulas, with one difference: warm-up starts at peak / warmup_steps instead of at 0, so the first
    step is not lost.
    """

    kind: Literal["constant", "linear", "cosine"]
    peak: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def warmup_steps(total_steps: int, *, ratio: float, steps: int | None) -> int:
    """`steps` if given, else the share `ratio` of all steps, rounded up as Hugging Face does."""
    return min(steps if steps is not None else math.ceil(total_steps * ratio), total_steps)
