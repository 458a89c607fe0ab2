"""How a run ended: what is said of it, and what is left of one that has nothing more to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.errors import QloraHalError, StoppedError, StorageError
from qlora_hal.errors.way_on import resume_line
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.report.curves import LOSS_PICTURE, write_loss_picture
from qlora_hal.report.html import REPORT_FILE, write_report
from qlora_hal.run.adapters import adapter_problem
from qlora_hal.run.directory import RUN_FILE
from qlora_hal.run.result import TrainResult, written

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.run.directory import RunDirectory
    from qlora_hal.run.loop import Progress


def result_of_finished(
    directory: RunDirectory, record: RunRecord, state: TrainingState, tell: Callable[[str], None]
) -> TrainResult | None:
    """What a run gave that has ended with this very state; None while anything is left to do, be it to write an adapter
    again that was damaged since, which is told."""
    if record.status != "finished" or record.steps != state.step or not directory.adapter_dir.is_dir():
        return None
    if problem := adapter_problem(directory.adapter_dir, directory.content.get("run_id")):
        tell(f"the run has ended, but {directory.adapter_dir.name} is not what it wrote there: {problem}")
        return None
    return TrainResult.from_record(record, directory.path, directory.adapter_dir)


@contextmanager
def reported_when_finished(directory: RunDirectory) -> Iterator[None]:
    """However far a run has come when a signal ends it at once: run.json says so, and the user what is safe. Raises
    StoppedError QH-S19 in its place when the state is saved and the signal was the first."""
    try:
        yield
    except EndedAtOnce as ended:
        told = ended_in(directory.path, ended)  # before anything else: a second signal may end this, too
        if directory.content.get("status") != "finished":
            with suppress(StorageError):  # the signal is what ended the run
                now = datetime.now(UTC).isoformat(timespec="seconds")
                directory.record({"status": "stopped", "stopped_because": ended.name, "finished_at": now})
        raise told from ended


def ended_in(run_dir: Path, ended: EndedAtOnce) -> EndedAtOnce | StoppedError:
    """What to raise of a run in `run_dir` that a signal ended: with a step on disk nothing is lost but the steps since,
    and the first signal asks for no more than that."""
    ended.run_dir, ended.safe_step = run_dir, max((step for step, _ in checkpoints(run_dir)), default=None)
    if ended.again or ended.safe_step is None:
        return ended
    return StoppedError(
        "QH-S19",
        f"Stopped by {ended.name} while no step was in progress; step {ended.safe_step} is saved.",
        where=str(run_dir),
        fix=f"Resume with: {resume_line(run_dir)}",
        context={"step": ended.safe_step},
    )


def print_already_finished(result: TrainResult, console: RunConsole) -> None:
    """Say that a run has nothing left to do, and show once more what it gave."""
    # A run that was killed right after its end has no report, or still the one of an earlier stop.
    if any(_is_older(result.run_dir / name, result.run_dir) for name in (REPORT_FILE, LOSS_PICTURE)):
        write_pages(result.run_dir)
    why = "" if result.stopped_because == "finished" else f" by {result.stopped_because}"
    console.note(f"already finished: the run ended{why} after step {result.steps}")
    console.finished(result, written(result.run_dir))


def write_pages(run_dir: Path) -> None:
    """The report and the curve of what run.json and the log hold. Raises StorageError."""
    write_report(run_dir)
    write_loss_picture(run_dir)


def _is_older(page: Path, run_dir: Path) -> bool:
    return not page.exists() or page.stat().st_mtime < (run_dir / RUN_FILE).stat().st_mtime


def write_report_of_failed(run_dir: Path) -> None:
    """The report of a run up to where it broke off. What ended the run is told to the user, not what stands in the
    way of the report: a full disk, or memory that ran out, is likely both."""
    with suppress(QloraHalError, OSError, MemoryError):
        write_report(run_dir)


def warning_if_regressed(before: float | None, after: float | None, progress: Progress) -> str:
    """What to say of an adapter that answers held-out rows worse than its base does; empty where it does not."""
    if before is None or after is None or not after > before:  # nor where one is not a number
        return ""
    best = progress.best_loss
    way_out = (
        f" At step {progress.best_step} it was {best:.4f}: training.load_best_adapter_at_end true keeps that one."
        if best is not None and best < before
        else " A lower training.learning_rate, or fewer steps, may help."
    )
    return (
        f"the adapter is worse than the base on the validation rows: their loss was {before:.4f} before training, "
        f"and is {after:.4f} with the adapter.{way_out}"
    )
