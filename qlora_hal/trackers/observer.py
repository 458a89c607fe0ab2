"""One observer for all trackers: it hears a run's hooks and tells a tracker what to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from qlora_hal.hooks import hookimpl
from qlora_hal.trackers import figures_of_run

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult

Figures = Mapping[str, float]
Samples = Sequence[Mapping[str, str]]


class Tracker(Protocol):
    """What a tracker's library is asked to do. `start` comes first; after `finish` or `fail` nothing comes."""

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        """Begin a run called `name`, in `project` where the tracker has such."""

    def log(self, figures: Figures, step: int) -> None:
        """Write figures of a step; evaluations may come for a step that was written before."""

    def finish(self, figures: Figures, samples: Samples) -> None:
        """Write the figures of the whole run and its sample answers, and end it as successful."""

    def fail(self) -> None:
        """End the run as failed."""


class TrackerObserver:
    """Begins one run of a tracker for each call of train or resume, and ends it as the call did."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._started = False

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        settings = figures_of_run.settings_of(run)
        self._tracker.start(run.run_dir, figures_of_run.run_name(run), run.config.training.tracker_project, settings)
        self._started = True

    @hookimpl
    def qlora_hal_step_finished(
        self,
        step: int,
        stats: StepStats,
        learning_rate: float,
        epoch: float,
        tokens_per_second: float,
        memory_bytes: int | None,
    ) -> None:
        figures = figures_of_run.of_step(stats, learning_rate, epoch, tokens_per_second, memory_bytes)
        if self._started and figures:
            self._tracker.log(figures, step)

    @hookimpl
    def qlora_hal_evaluated(self, step: int, evaluation: LossSum, metrics: Figures) -> None:
        figures = figures_of_run.of_evaluation(evaluation, metrics)
        if self._started and figures:
            self._tracker.log(figures, step)

    @hookimpl
    def qlora_hal_run_finished(self, result: TrainResult) -> None:
        if self._started:
            self._started = False
            self._tracker.finish(figures_of_run.of_result(result), result.samples)

    @hookimpl
    def qlora_hal_run_failed(self) -> None:
        if self._started:
            self._started = False
            self._tracker.fail()
