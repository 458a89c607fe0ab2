"""MLflow. The server comes from its own variable MLFLOW_TRACKING_URI; a project is what it calls an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_hal.trackers.figures_of_run import samples_as_text
from qlora_hal.trackers.observer import Figures, Samples, Tracker

_VALUE_LIMIT = 500
"""MLflow's file store refuses longer parameter values."""


def make_tracker() -> Tracker:
    return MlflowTracker()


class MlflowTracker:
    """Without a project, MLFLOW_EXPERIMENT_NAME decides."""

    def start(self, run_dir: Path, name: str, project: str | None, settings: Mapping[str, object]) -> None:
        import mlflow

        if project is not None:
            mlflow.set_experiment(project)
        mlflow.start_run(run_name=name)
        mlflow.log_params({key: str(value)[:_VALUE_LIMIT] for key, value in settings.items()})

    def log(self, figures: Figures, step: int) -> None:
        import mlflow

        mlflow.log_metrics(dict(figures), step=step)

    def finish(self, figures: Figures, samples: Samples) -> None:
        import mlflow

        mlflow.log_metrics(dict(figures))
        if samples:
            mlflow.log_text(samples_as_text(samples), "samples.md")
        mlflow.end_run("FINISHED")

    def fail(self) -> None:
        import mlflow

        mlflow.end_run("FAILED")
