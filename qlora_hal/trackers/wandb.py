"""Weights & Biases. Its own variables choose the mode (WANDB_MODE=offline) and the account."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_hal.trackers.figures_of_run import DEFAULT_PROJECT
from qlora_hal.trackers.observer import Figures, Samples, Tracker


def make_tracker() -> Tracker:
    return WandbTracker()


class WandbTracker:
    """Without a project, WANDB_PROJECT decides. Evaluations may share a step with training, so `step` is a metric of
    its own instead of wandb's counter, which refuses to go back."""

    _run: Any

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        import wandb

        self._run = wandb.init(
            project=project or os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=name,
            dir=str(run_dir),
            config=dict(settings),
            save_code=False,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Figures, step: int) -> None:
        self._run.log({**figures, "step": step})

    def finish(self, figures: Figures, samples: Samples) -> None:
        import wandb

        if samples:
            columns = ["prompt", "before", "after"]
            rows = [[sample.get(column, "") for column in columns] for sample in samples]
            self._run.log({"samples": wandb.Table(columns=columns, data=rows)})
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0)

    def fail(self) -> None:
        self._run.finish(exit_code=1)
