"""MLflow. The server comes from its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_hal.hooks import hookimpl
from qlora_hal.trackers import figures_of_run

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult

_VALUE_LIMIT = 500
"""MLflow's file store refuses longer parameter values."""


def make_observer() -> MlflowObserver:
    return MlflowObserver()


class MlflowObserver:
    """One MLflow run for each call of train or resume."""

    def __init__(self) -> None:
        self._started = False

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        import mlflow

        mlflow.start_run(run_name=figures_of_run.run_name(run))
        self._started = True
        mlflow.log_params({key: str(value)[:_VALUE_LIMIT] for key, value in figures_of_run.settings_of(run).items()})

    @hookimpl
    def qlora_hal_step_finished(self, run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
        self._log(figures_of_run.of_step(stats, learning_rate), step)

    @hookimpl
    def qlora_hal_evaluated(self, run: RunView, step: int, evaluation: LossSum) -> None:
        self._log(figures_of_run.of_evaluation(evaluation), step)

    @hookimpl
    def qlora_hal_run_finished(self, run: RunView, result: TrainResult) -> None:
        if self._started:
            import mlflow

            mlflow.log_metrics(figures_of_run.of_result(result))
        self._end("FINISHED")

    @hookimpl
    def qlora_hal_run_failed(self, run: RunView, error: BaseException) -> None:
        self._end("FAILED")

    def _end(self, status: str) -> None:
        if self._started:
            import mlflow

            mlflow.end_run(status)
            self._started = False

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self._started and figures:
            import mlflow

            mlflow.log_metrics(figures, step=step)
