"""The pluggy hooks: who calls them, when, and what a return value means. Entry-point group: `qlora_hal.hooks`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from qlora_hal.backend import BackendSpec, ProbeReport
    from qlora_hal.capabilities import Needs
    from qlora_hal.config import RunConfig
    from qlora_hal.observing import RunView, TrainResult
    from qlora_hal.values import LossSum, StepStats

PROJECT = "qlora_hal"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qlora_hal_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Offer backends from inside this process, beside the entry points. Called at each discovery."""


@hookspec(firstresult=True)
def qlora_hal_choose_backend(reports: tuple[ProbeReport, ...], needs: Needs) -> str | None:
    """Override the automatic choice: return the name of a ready backend, or None to leave it. Called once a run."""


@hookspec(firstresult=True)
def qlora_hal_config_ready(config: RunConfig) -> RunConfig | None:
    """Replace the configuration before anything is resolved from it, or None to leave it. Called once a run."""


@hookspec
def qlora_hal_run_started(run: RunView) -> None:
    """Observe: the model is loaded, the first step is about to run. Called once a run."""


@hookspec
def qlora_hal_step_finished(run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
    """Observe: one optimizer step is known. Called once a step, one step late."""


@hookspec
def qlora_hal_evaluated(run: RunView, step: int, evaluation: LossSum) -> None:
    """Observe: an evaluation ended. Called before, during (`training.eval_steps`) and after training."""


@hookspec
def qlora_hal_checkpoint_saved(run: RunView, step: int, path: Path) -> None:
    """Observe: a checkpoint is durable under its final name."""


@hookspec
def qlora_hal_run_finished(run: RunView, result: TrainResult) -> None:
    """Observe: everything is written. Called once a run."""


@hookspec
def qlora_hal_conformance_sections() -> Iterable[Path]:  # type: ignore[empty-body]
    """Offer extra conformance sections of a plugin; they never count towards a certificate."""
