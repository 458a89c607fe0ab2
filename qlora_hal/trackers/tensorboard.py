"""Event files in `<run>/tensorboard`, written by tensorboard's own writer (no torch, no TensorFlow)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_hal.hooks import hookimpl
from qlora_hal.trackers import figures_of_run

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView, TrainResult


def make_observer() -> TensorBoardObserver:
    return TensorBoardObserver()


class TensorBoardObserver:
    """Writes scalars; a resumed run appends another event file to the same folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.run_dir / "tensorboard"))

    @hookimpl
    def qlora_hal_step_finished(self, run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
        self._write(figures_of_run.of_step(stats, learning_rate), step)

    @hookimpl
    def qlora_hal_evaluated(self, run: RunView, step: int, evaluation: LossSum) -> None:
        self._write(figures_of_run.of_evaluation(evaluation), step)

    @hookimpl
    def qlora_hal_run_finished(self, run: RunView, result: TrainResult) -> None:
        self._end()

    @hookimpl
    def qlora_hal_run_failed(self, run: RunView, error: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, figures: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
