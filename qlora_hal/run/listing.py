"""The runs below a folder, each with its state and figures: finished, at work, interrupted, broken. Only reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.checkpoint.state import CHECKPOINTS_FOLDER
from qlora_hal.errors import ConfigError, QloraHalError
from qlora_hal.files.refused_paths import named_path
from qlora_hal.report.run_file import RUN_FILE, examined_run_file
from qlora_hal.report.series import RunSeries, read_series
from qlora_hal.run.directory import METRICS_FILE, RUN_FOLDERS
from qlora_hal.run.lock import LOCK_FILE, OWNER_FILE, is_held

DEPTH = 4
"""Levels below the folder that are searched; runs lie in the folder itself, or sorted by project and date."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run. `state` is finished, stopped, failed, running, interrupted (its process is gone), not started
    (refused before the model loaded) or broken; `problem` says what is wrong with its record, and what is known of it
    stands nevertheless. Losses are nats per token."""

    folder: Path
    state: str
    problem: str = ""
    model: str = ""
    backend: str = ""
    steps: int = 0
    total_steps: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    seconds: float | None = None
    started_at: str = ""

    def as_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__} | {"folder": str(self.folder)}


def runs_below(folder: str | Path) -> list[RunSummary]:
    """Every run in `folder` and below it, the oldest first. Raises ConfigError QH-U62 where it cannot be listed."""
    top = named_path(folder)
    if not top.is_dir():
        raise ConfigError(
            "QH-U62",
            f"{folder} is {'a file' if top.exists() else 'not there'}; a folder with runs is expected.",
            where=str(folder),
            fix="Name the folder that output_dir of the runs is in: qlora-hal runs FOLDER",
        )
    return sorted((summary(run) for run in _run_folders(top, DEPTH)), key=lambda run: (run.started_at, run.folder))


def summary(folder: Path) -> RunSummary:
    """What is known of one run; a record that cannot be used makes it broken, and raises nothing."""
    try:
        run, problem = examined_run_file(folder)
    except QloraHalError as error:
        return RunSummary(folder, "broken", error.message)
    try:
        series = read_series(folder)
    except (OSError, QloraHalError) as error:
        series, problem = RunSeries([], [], [], [], [], [], [], ()), problem or f"its log cannot be read: {error}"
    return _summarized(folder, run, series, problem)


def _summarized(folder: Path, run: Mapping[str, object], series: RunSeries, problem: str) -> RunSummary:
    config, resolved, timings = (_mapping(run.get(name)) for name in ("config", "resolved", "timings"))
    named = _mapping(run.get("model")).get("name") or _mapping(config.get("model")).get("name_or_path") or ""
    return RunSummary(
        folder=folder,
        state="broken" if problem else _state(folder, run),
        problem=problem,
        model=str(named),
        backend=str(resolved.get("backend") or ""),
        steps=max(_whole(run.get("steps")) or 0, int(series.loss[-1][0]) if series.loss else 0),
        total_steps=_whole(resolved.get("total_steps")),
        first_loss=series.loss[0][1] if series.loss else None,
        last_loss=series.loss_average[-1][1] if series.loss_average else None,
        eval_loss_before=_number(run.get("eval_loss_before")),
        eval_loss_after=_number(run.get("eval_loss_after")),
        seconds=_number(timings.get("wall_seconds")),
        started_at=str(run.get("started_at") or ""),
    )


def _state(folder: Path, run: Mapping[str, object]) -> str:
    status = str(run.get("status") or "")
    if status not in ("", "running"):
        return status
    held = is_held(folder)
    if held is False:
        return "interrupted" if status else "not started"
    return "running" if held else "running elsewhere"


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with the record of a run, or with its lock and more of it, and those below: a run may have been written
    into the folder of others. Links are not followed: what lies behind one is not below."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    # A start that was refused leaves its lock in a folder that may be anyone's.
    began = names == {LOCK_FILE} or names & {OWNER_FILE, METRICS_FILE, CHECKPOINTS_FOLDER}
    if RUN_FILE in names or (LOCK_FILE in names and began):
        yield folder
    if depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and entry.name not in RUN_FOLDERS:
                yield from _run_folders(Path(entry.path), depth - 1)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
