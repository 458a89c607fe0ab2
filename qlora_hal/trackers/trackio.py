"""trackio: local first. Its own variables choose a Space (TRACKIO_SPACE_ID) and the place (TRACKIO_DIR)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_hal.trackers.figures_of_run import DEFAULT_PROJECT, samples_as_text
from qlora_hal.trackers.observer import Figures, Samples, Tracker


def make_tracker() -> Tracker:
    return TrackioTracker()


class TrackioTracker:
    """Without a project, TRACKIO_PROJECT decides."""

    _run: Any

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        import trackio

        project = project or os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        self._run = trackio.init(project=project, name=name, config=dict(settings))

    def log(self, figures: Figures, step: int) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, figures: Figures, samples: Samples) -> None:
        import trackio

        self._run.log({**figures, **({"samples": trackio.Markdown(samples_as_text(samples))} if samples else {})})
        self._run.finish()

    def fail(self) -> None:
        self._run.finish()
