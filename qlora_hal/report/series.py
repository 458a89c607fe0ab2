"""The curves of a run, read from its metrics once for both the HTML report and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.report.metrics import read_metrics, smoothed

METRICS_FILE = "metrics.jsonl"

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class RunSeries:
    """Everything that a run logged over its steps. Points are (step, value); values that were not finite are absent,
    and their steps are in `nonfinite_steps`."""

    loss: Points
    loss_average: Points
    eval_loss: Points
    grad_norm: Points
    learning_rate: Points
    tokens_per_second: Points
    memory_bytes: Points
    nonfinite_steps: tuple[int, ...]


def read_series(run_dir: Path) -> RunSeries:
    """Read metrics.jsonl. A step that was logged twice counts once, with its last line."""
    steps: dict[int, dict[str, object]] = {}
    evaluations: dict[int, dict[str, object]] = {}
    for record in read_metrics(run_dir / METRICS_FILE):
        step = record.get("step")
        if type(step) is int:  # true is no step
            (evaluations if "eval_loss" in record else steps)[step] = record
    rows = [steps[step] for step in sorted(steps)]
    losses = _points(rows, "loss")
    averages = smoothed([value for _, value in losses])
    return RunSeries(
        loss=losses,
        loss_average=[(step, a) for (step, _), a in zip(losses, averages, strict=True) if a is not None],
        eval_loss=_points([evaluations[step] for step in sorted(evaluations)], "eval_loss"),
        grad_norm=_points(rows, "grad_norm"),
        learning_rate=_points(rows, "learning_rate"),
        tokens_per_second=_points(rows, "tokens_per_second"),
        memory_bytes=_points(rows, "memory_bytes"),
        nonfinite_steps=tuple(step for step in sorted(steps) if steps[step].get("nonfinite")),
    )


def _points(rows: Sequence[dict[str, object]], key: str) -> Points:
    points: Points = []
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int) and isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):  # a damaged number of hundreds of digits
                points.append((float(step), float(value)))
    return points
