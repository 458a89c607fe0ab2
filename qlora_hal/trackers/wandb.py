"""Weights & Biases. Project and mode come from its own variables (WANDB_PROJECT, WANDB_MODE=offline)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qlora_hal.hooks import hookimpl
from qlora_hal.trackers import figures_of_run

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult


def make_observer() -> WandbObserver:
    return WandbObserver()


class WandbObserver:
    """One wandb run for each call of train or resume. Evaluations may share a step with training, so `step` is a
    metric of its own instead of wandb's counter, which refuses to go back."""

    def __init__(self) -> None:
        self._run: Any = None

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qlora-hal"),
            name=figures_of_run.run_name(run),
            dir=str(run.run_dir),
            config=dict(figures_of_run.settings_of(run)),
            save_code=False,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @hookimpl
    def qlora_hal_step_finished(self, run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
        self._log(figures_of_run.of_step(stats, learning_rate), step)

    @hookimpl
    def qlora_hal_evaluated(self, run: RunView, step: int, evaluation: LossSum) -> None:
        self._log(figures_of_run.of_evaluation(evaluation), step)

    @hookimpl
    def qlora_hal_run_finished(self, run: RunView, result: TrainResult) -> None:
        if self._run is not None:
            self._run.summary.update(figures_of_run.of_result(result))
        self._end(0)

    @hookimpl
    def qlora_hal_run_failed(self, run: RunView, error: BaseException) -> None:
        self._end(1)

    def _end(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self._run is not None and figures:
            self._run.log({**figures, "step": step})
