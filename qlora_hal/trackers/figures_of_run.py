"""The figures that every tracker gets, under the same names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_hal.config.resolve import flatten_config
from qlora_hal.errors.redaction import redacted

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult


DEFAULT_PROJECT = "qlora-hal"


def of_step(
    stats: StepStats, learning_rate: float, epoch: float, tokens_per_second: float, memory_bytes: int | None
) -> dict[str, float]:
    """The figures of one optimizer step; one that is not finite is left out, since most trackers drop or refuse it.
    `memory_bytes` is the peak so far, None where the backend does not tell it."""
    figures = {
        "train/loss": stats.loss,
        "train/grad_norm": stats.grad_norm,
        "train/learning_rate": learning_rate,
        "train/epoch": epoch,
        "train/tokens_per_second": tokens_per_second,
        "train/memory_bytes": memory_bytes,
    }
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}


def of_evaluation(evaluation: LossSum, metrics: Mapping[str, float]) -> dict[str, float]:
    """The loss and what the user's own functions found, as far as they are finite."""
    figures = {"eval/loss": evaluation.loss, **{f"eval/{name}": value for name, value in metrics.items()}}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def of_result(result: TrainResult) -> dict[str, float]:
    """Figures of the whole run, for a tracker's summary."""
    figures = {
        "eval/loss_before": result.eval_loss_before,
        "eval/loss_after": result.eval_loss_after,
        "run/wall_seconds": result.wall_seconds,
        "run/steps": result.steps,
        "run/tokens": result.tokens,
        "run/tokens_per_second": result.tokens_per_second,
        "run/peak_memory_bytes": result.peak_memory_bytes,
    }
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}


def samples_as_text(samples: Sequence[Mapping[str, str]]) -> str:
    """Prompts with the answers before and after training, as Markdown."""
    return "\n".join(
        f"## {sample.get('prompt', '')}\n\nBefore: {sample.get('before', '')}\n\nAfter: {sample.get('after', '')}\n"
        for sample in samples
    )


def settings_of(run: RunView) -> Mapping[str, str | int | float | bool]:
    """Configuration and resolved facts as flat names; secrets and the home folder are removed."""
    facts = {**dict(flatten_config(run.config)), **{f"resolved.{key}": value for key, value in run.resolved.items()}}
    plain = redacted(facts)
    if not isinstance(plain, Mapping):
        raise TypeError("redaction keeps mappings")
    return {key: value if isinstance(value, (str, int, float, bool)) else str(value) for key, value in plain.items()}


def run_name(run: RunView) -> str:
    """The name of the run's folder."""
    return run.run_dir.resolve().name
