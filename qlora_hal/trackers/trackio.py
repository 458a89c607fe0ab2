"""trackio: local first. Its own variables choose a Space (TRACKIO_SPACE_ID) and the place (TRACKIO_DIR)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qlora_hal.hooks import hookimpl
from qlora_hal.trackers import figures_of_run

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult


def make_observer() -> TrackioObserver:
    return TrackioObserver()


class TrackioObserver:
    """One trackio run for each call of train or resume."""

    def __init__(self) -> None:
        self._run: Any = None

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "qlora-hal"),
            name=figures_of_run.run_name(run),
            config=dict(figures_of_run.settings_of(run)),
        )

    @hookimpl
    def qlora_hal_step_finished(self, run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
        self._log(figures_of_run.of_step(stats, learning_rate), step)

    @hookimpl
    def qlora_hal_evaluated(self, run: RunView, step: int, evaluation: LossSum) -> None:
        self._log(figures_of_run.of_evaluation(evaluation), step)

    @hookimpl
    def qlora_hal_run_finished(self, run: RunView, result: TrainResult) -> None:
        if self._run is not None:
            self._run.log(figures_of_run.of_result(result))
        self._end()

    @hookimpl
    def qlora_hal_run_failed(self, run: RunView, error: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self._run is not None and figures:
            self._run.log(figures, step=step)
