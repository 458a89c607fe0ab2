"""Event files in `<run>/tensorboard`, written by tensorboard's own writer (no torch, no TensorFlow)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_hal.trackers.observer import Figures, Samples, Tracker


def make_tracker() -> Tracker:
    return TensorBoardTracker()


class TensorBoardTracker:
    """Writes scalars, all that this writer has; a resumed run appends another event file to the same folder."""

    _writer: Any

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run_dir / "tensorboard"))

    def log(self, figures: Figures, step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, figures: Figures, samples: Samples) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close()

    def fail(self) -> None:
        self._writer.close()
