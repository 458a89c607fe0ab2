"""What the loop tells, written down: metrics, console, observers, checkpoints, the best adapter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from qlora_hal.adapter.peft_files import write_adapter
from qlora_hal.checkpoint import TrainingState, save_checkpoint
from qlora_hal.errors import QloraHalError, figures
from qlora_hal.report.metrics import MetricsFile, evaluation_record, step_record
from qlora_hal.run.directory import BEST_ADAPTER_FOLDER
from qlora_hal.run.transfer import reference_logits

if TYPE_CHECKING:
    from qlora_hal.contract.checked_trainer import CheckedTrainer
    from qlora_hal.contract.values import Adapter, Batch, LossSum
    from qlora_hal.files.safetensors_file import Array
    from qlora_hal.hooks import Control, Hooks
    from qlora_hal.inference.loaded_model import LoadedModel
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.live_page import LivePage
    from qlora_hal.run.loop import FinishedStep, Progress
    from qlora_hal.run.record import RunRecordFile
    from qlora_hal.run.result import RunView
    from qlora_hal.run.watchdog import Watchdog

_SPEED_WINDOW = 20
_JUMP_WINDOW, _JUMP_DEVIATIONS = 50, 6.0
"""A loss is told to have jumped when it lies so many standard deviations above the mean of so many steps before it."""


@dataclass(slots=True)
class RunCallbacks:
    """Implements `loop.LoopEvents` for one call of train or resume."""

    run: RunView
    trainer: CheckedTrainer
    model: LoadedModel
    metrics: MetricsFile
    console: RunConsole
    hooks: Hooks
    record_file: RunRecordFile
    watchdog: Watchdog
    provenance: Mapping[str, object]
    keep_checkpoints: int
    measures_memory: bool
    memory_limit: int | None
    epoch_of: Callable[[int], float]
    page: LivePage | None = None
    questions: Sequence[Batch] = ()
    resumed_from: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    trained_tokens: int = 0
    trained_seconds: float = 0.0
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_WINDOW))
    _above_limit: bool = False

    def _tell_above_limit(self, step: int, peak: int | None) -> None:
        """Once, where what was planned to stay below `training.memory_limit` did not."""
        limit = self.run.config.training.memory_limit_bytes
        if peak is None or limit is None or peak <= limit or self._above_limit:
            return
        self._above_limit = True
        self.note(
            f"step {step}: {figures.size(peak)} at the peak, above training.memory_limit ({figures.size(limit)}); the "
            "plan was lower. A smaller training.per_device_train_batch_size takes less"
        )

    def step(self, finished: FinishedStep) -> Control | None:
        if jump := loss_jump([loss for _, loss in self.losses[-_JUMP_WINDOW:]], finished.stats.loss):
            self.note(f"step {finished.step}: {jump}")
        self.losses.append((finished.step, finished.stats.loss))
        self.record_file.reached(finished)
        self._recent.append((finished.real_tokens, finished.seconds))
        self.trained_tokens += finished.real_tokens
        self.trained_seconds += finished.seconds
        seconds = sum(took for _, took in self._recent) / len(self._recent)
        speed = sum(tokens for tokens, _ in self._recent) / max(sum(took for _, took in self._recent), 1e-9)
        self.watchdog.beat(seconds)
        memory = self.trainer.peak_memory_bytes() if self.measures_memory else None
        self._tell_above_limit(finished.step, memory)
        speed_of_step = finished.real_tokens / max(finished.seconds, 1e-9)
        self.metrics.append(
            step_record(
                finished.step,
                finished.stats,
                learning_rate=finished.learning_rate,
                epoch=finished.epoch,
                tokens_seen=finished.tokens_seen,
                tokens_per_second=speed_of_step,
                seconds_per_step=finished.seconds,
                memory_bytes=memory,
            )
        )
        self.console.step(
            self.run,
            finished.step,
            finished.stats,
            learning_rate=finished.learning_rate,
            tokens_per_second=speed,
            seconds_per_step=seconds,
            epoch=finished.epoch,
            tokens_seen=finished.tokens_seen,
            memory_bytes=memory,
            memory_limit=self.memory_limit,
            eta_seconds=seconds * (self.run.total_steps - finished.step),
        )
        self.hooks.tell(
            "qlora_hal_step_finished",
            run=self.run,
            step=finished.step,
            stats=finished.stats,
            learning_rate=finished.learning_rate,
            epoch=finished.epoch,
            tokens_per_second=speed_of_step,
            memory_bytes=memory,
        )
        if self.page is not None:
            self.page.refresh()
        return self.hooks.control(run=self.run, step=finished.step, stats=finished.stats, evaluation=None, metrics={})

    @property
    def tokens_per_second(self) -> float | None:
        return self.trained_tokens / self.trained_seconds if self.trained_seconds > 0 else None

    def evaluated(self, step: int, evaluation: LossSum, label: str) -> Control | None:
        measured = self.hooks.measured(run=self.run, step=step, model=self.model)
        self.metrics.append(evaluation_record(step, evaluation, label, measured))
        self.console.evaluated(step, evaluation.loss, label, measured)
        facts = {"run": self.run, "step": step, "evaluation": evaluation, "metrics": measured}
        self.hooks.tell("qlora_hal_evaluated", **facts)
        return self.hooks.control(stats=None, **facts) if label == "during" else None

    def save(self, step: int, progress: Progress) -> None:
        if note := self.metrics.restored():
            self.note(note)
        self.metrics.sync()
        self.record_file.saving(progress)
        state = TrainingState(
            step=step,
            epoch=self.epoch_of(step),
            tokens_seen=progress.tokens_seen,
            adapter=self.trainer.export_adapter(),
            optimizer=self.trainer.export_optimizer(),
            loop={**progress.as_json(), "metrics": self.metrics.mark()},
            provenance=self.provenance,
            answers=self._answers(),
        )
        self._write(state)

    def _write(self, state: TrainingState) -> None:
        protect = () if self.resumed_from is None else (self.resumed_from,)
        path = save_checkpoint(
            self.run.run_dir, state, keep=self.keep_checkpoints, protect=protect, record=self.record_file.content
        )
        self.console.checkpoint(state.step, path)
        self.hooks.tell("qlora_hal_checkpoint_saved", run=self.run, step=state.step, path=path)

    def _answers(self) -> Mapping[str, Array]:
        """Never a reason for a save to fail: a device that is full may have no room for logits."""
        try:
            return reference_logits(self.trainer, self.questions)
        except QloraHalError as problem:
            self.note(f"no answers were saved with the checkpoint: {problem.message}")
            return {}

    def best(self, step: int, adapter: Adapter) -> None:
        write_run_adapter(self.run.run_dir / BEST_ADAPTER_FOLDER, adapter, {**self.provenance, "step": step})

    def note(self, text: str) -> None:
        self.console.note(text)


class FollowingCallbacks(RunCallbacks):
    """Of a rank that another one writes for: it asks its trainer for all that goes into a checkpoint, as every rank
    must, and leaves it at that."""

    def _write(self, state: TrainingState) -> None:
        """Nothing."""


def loss_jump(before: Sequence[float], loss: float) -> str:
    """What to say of a loss far above those of the steps before it; nothing while these are too few to tell."""
    if len(before) < _JUMP_WINDOW:
        return ""
    mean, deviation = fmean(before), pstdev(before)
    if loss <= mean + _JUMP_DEVIATIONS * deviation:
        return ""
    return f"the loss jumped to {loss:.4f}; the {len(before)} steps before had {mean:.4f} on average"


def write_run_adapter(folder: Path, adapter: Adapter, provenance: Mapping[str, object]) -> None:
    """The adapter in PEFT layout with this run's provenance."""
    revision = provenance.get("base_revision")
    write_adapter(
        folder,
        adapter,
        base_name=str(provenance["base_name"]),
        base_revision=str(revision) if revision else None,
        provenance=provenance,
    )
