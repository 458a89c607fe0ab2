"""run.json as it grows: a fact is written when it is known, and stays when the call fails or the process dies."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_hal import __version__
from qlora_hal.detect.hardware import inventory
from qlora_hal.errors import StorageError
from qlora_hal.model.fingerprint import coverage
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.report.run_file import Detection, RunRecord, given_config, run_facts

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.transfer_record import Transfer
    from qlora_hal.run.directory import RunDirectory
    from qlora_hal.run.loop import FinishedStep, Progress
    from qlora_hal.run.prepare import PreparedRun
    from qlora_hal.run.result import TrainResult


class RunRecordFile:
    """The record of a run during one call of train or resume.

    A resume adds to what earlier calls wrote: the run's start stays, times and notes are summed up.
    """

    def __init__(
        self, directory: RunDirectory, console: RunConsole, record: RunRecord, state: TrainingState | None = None
    ) -> None:
        self._directory = directory
        self._console = console
        self._record = record
        self._resumed = state is not None
        self._begun = False
        self._steps, self._tokens = (state.step, state.tokens_seen) if state is not None else (0, 0)
        self._started = time.perf_counter()
        self._earlier = record
        self._train_seconds = 0.0
        self._is_timed = True

    @property
    def record(self) -> RunRecord:
        return self._record

    @property
    def content(self) -> Mapping[str, object]:
        """What run.json holds now."""
        return self._directory.content

    @property
    def wall_seconds(self) -> float:
        """Seconds of this call."""
        return time.perf_counter() - self._started

    def begin(self, prepared: PreparedRun, resolved: Mapping[str, object], moved: Transfer | None) -> None:
        """The model is loaded and nothing was refused: the run is under way, here."""
        self._begun = True
        self.write(
            **facts_of_here(prepared),
            resolved=resolved,
            status="running",
            stopped_because="",
            started_at=self._earlier.started_at or _now(),
            finished_at="",
            hand_overs=(*self._earlier.hand_overs, *([moved.as_json()] if moved is not None else [])),
        )

    def trained_before(self, seconds: float) -> None:
        """What the steps took that earlier calls made and this one keeps."""
        self._train_seconds += seconds

    def time_is_unknown(self) -> None:
        """The log has lost steps, and with them what they took."""
        self._is_timed = False

    def reached(self, finished: FinishedStep) -> None:
        """Remember a step; it is written with whatever is written next."""
        self._steps, self._tokens = finished.step, finished.tokens_seen
        self._train_seconds += finished.seconds

    def saving(self, progress: Progress) -> None:
        """A checkpoint is about to be saved. Raises OutputLockedError QH-S15 when another run has the folder by now."""
        if note := self._directory.keep_lock():
            self._console.note(note)
        self.write(eval_loss_best=progress.best_loss, best_step=progress.best_step)

    def write(self, **facts: Any) -> None:
        """Put facts into run.json beside the steps, times and notes until now. Raises StorageError."""
        self._record = replace(
            self._record,
            **{
                "steps": self._steps,
                "tokens": self._tokens,
                "timings": self._timings(),
                "notes": _kept_notes((*self._earlier.notes, *self._console.notes)),
                **facts,
            },
        )
        self._directory.record(run_facts(self._record))

    def failed(self, error: BaseException) -> bool:
        """The call ended by an exception; whether it had begun to train. A resume that was refused before it began
        leaves the record as it was."""
        if self._resumed and not self._begun:
            return False
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped and self._record.status == "finished":
            return self._begun
        with suppress(StorageError):  # a full disk is likely the very error that ended the run
            why = error.name if isinstance(error, EndedAtOnce) else type(error).__name__
            self.write(status="stopped" if stopped else "failed", stopped_because=why, finished_at=_now())
        return self._begun

    def finish(self, result: TrainResult, progress: Progress) -> None:
        """The call ended by itself or by a signal."""
        finished = not result.stopped_by_signal
        self.write(
            status="finished" if finished else "stopped",
            stopped_because=result.stopped_because,
            finished_at=_now(),
            eval_loss_before=result.eval_loss_before,
            eval_loss_after=result.eval_loss_after,
            eval_loss_best=progress.best_loss,
            best_step=progress.best_step,
            samples=result.samples,
            peak_memory_bytes=self._peak(result.peak_memory_bytes),
            adapter_dir=self._directory.adapter_dir.name if finished else "",
        )

    def _timings(self) -> dict[str, float]:
        timings = {"wall_seconds": self._earlier.timings.get("wall_seconds", 0.0) + self.wall_seconds}
        if self._train_seconds > 0 and self._is_timed:
            timings["train_seconds"] = self._train_seconds
            timings["tokens_per_second"] = self._tokens / self._train_seconds
        return timings

    def _peak(self, peak: int | None) -> int | None:
        """The highest of all calls on the same device."""
        earlier = self._earlier.peak_memory_bytes
        same = self._earlier.resolved.get("device") == self._record.resolved.get("device")
        return max(peak, earlier) if same and peak is not None and earlier is not None else peak


MOST_NOTES = 1000
"""In run.json, which is written anew at each save and read within bounds. A run may tell something of each step."""
_MORE_NOTES = "there were more notes, which this record leaves out"


def _kept_notes(notes: Sequence[str]) -> tuple[str, ...]:
    """Each once, the first of them where there are too many."""
    once = [note for note in dict.fromkeys(notes) if note != _MORE_NOTES]
    return tuple(once) if len(once) <= MOST_NOTES and _MORE_NOTES not in notes else (*once[:MOST_NOTES], _MORE_NOTES)


def first_record(config: RunConfig, origins: Mapping[str, str], prepared: PreparedRun) -> RunRecord:
    """What is known of a new run before its model loads."""
    return RunRecord(
        config=given_config(config),
        origins=origins,
        data_report={"lines": prepared.data.report.lines(), **prepared.data.report.as_json()},
        **facts_of_here(prepared),
    )


def facts_of_here(prepared: PreparedRun) -> dict[str, Any]:
    """The part of a record that another machine or another backend has otherwise."""
    resolved_backend, facts = prepared.resolved_backend, prepared.resolved_backend.source.origin.facts
    choice, base = resolved_backend.choice, resolved_backend.source
    model: dict[str, object] = {
        "name": base.name,
        "revision": base.revision,
        "architecture": facts.architecture,
        "parameter_count": facts.parameter_count,
        "fingerprint": facts.fingerprint,
        "fingerprint_covers": coverage(facts.tensors),
        "target_modules": list(resolved_backend.adapter.target_modules),
    }
    if prepared.model_hashes:
        model["files"] = dict(prepared.model_hashes)
    if base.made_from is not None:
        # Where the base lies that was quantized for this run, so that the trained model can be opened again.
        model["quantized"] = {"folder": str(base.path), "fingerprint": base.facts.fingerprint}
    return {
        "model": model,
        "versions": resolved_backend.report.versions,
        "detection": Detection.of(choice.spec.name, choice.reason, resolved_backend.reports, choice.rejections),
        "environment": _environment(),
        "memory_estimate": {**asdict(prepared.estimate), "total": prepared.estimate.total},
    }


def _environment() -> dict[str, object]:

    machine = inventory()
    return {
        "qlora_hal": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.cpu.name,
        "cores": machine.cpu.logical_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [gpu.name for gpu in machine.gpus],
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
