"""The training loop. No tensors here: windows go in, figures come out, one step late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from qlora_hal.config.schema import SMALLEST_FLOAT32
from qlora_hal.contract.type_checks import wrong_fields
from qlora_hal.contract.values import Adapter, Batch, LossSum, PendingStep, StepSettings, StepStats
from qlora_hal.errors import NumericsError, OutOfMemoryError
from qlora_hal.run.gradient_noise import epsilon_above
from qlora_hal.run.steering import EVALUATE, SAVE, STOP, Steering

if TYPE_CHECKING:
    from qlora_hal.config.schema import TrainingConfig
    from qlora_hal.contract.checked_trainer import CheckedTrainer
    from qlora_hal.contract.values import ComputeDtype
    from qlora_hal.hooks import Control
    from qlora_hal.run.lr_schedule import Schedule


class Windows(Protocol):
    """Where windows come from: a pure function of the step. `window` is this rank's share; the counts of tokens and the
    rows are those of all ranks."""

    def window(self, step: int) -> list[Batch]: ...

    def token_count(self, step: int) -> int: ...

    def real_tokens(self, step: int) -> int: ...

    def rows_of(self, step: int) -> list[int]: ...

    def epoch_of(self, step: int) -> float: ...


class LoopEvents(Protocol):
    """What the loop tells as it goes, and what is asked of it in answer. Exceptions stop the run, so observers are
    wrapped before they come here."""

    def step(self, finished: FinishedStep) -> Control | None: ...

    def evaluated(self, step: int, evaluation: LossSum, label: str) -> Control | None: ...

    def save(self, step: int, progress: Progress) -> None: ...

    def best(self, step: int, adapter: Adapter) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Everything known of one step. `real_tokens` are not padding."""

    step: int
    stats: StepStats
    learning_rate: float
    epoch: float
    seconds: float
    real_tokens: int
    tokens_seen: int


@dataclass(slots=True)
class Progress:
    """The part of a run's state that the loop owns; it is saved as JSON and goes on from there. `adam_epsilon` is what
    was measured at the first step, None where nothing is."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    micro_batch_splits: int = 0
    adam_epsilon: float | None = None
    steering: Steering = field(default_factory=Steering)

    def as_json(self) -> dict[str, object]:
        return {**{name: getattr(self, name) for name in self.__slots__}, "steering": self.steering.as_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> Progress:
        """Raises TypeError or ValueError for what `as_json` does not give."""
        known = {name: stored[name] for name in cls.__slots__ if name in stored}
        if isinstance(asked := known.get("steering"), dict):
            known["steering"] = Steering.from_json(asked)
        progress = cls(**known)  # type: ignore[arg-type]
        if wrong := wrong_fields(progress):
            raise ValueError("; ".join(wrong))
        return progress


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """What does not change during the loop. Steps count from 0; `total_steps` is where it ends. `how_many_ranks` tells
    for each flag on how many ranks it is set: what one of them is asked for, all of them do."""

    total_steps: int
    seed: int
    schedule: Schedule
    training: TrainingConfig
    save_steps: int | None
    compute_dtype: ComputeDtype = "float32"
    evaluation: Callable[[], LossSum] | None = None
    stop_requested: Callable[[], str] = field(default=lambda: "")
    save_requested: Callable[[], bool] = field(default=lambda: False)
    how_many_ranks: Callable[..., tuple[int, ...]] = field(default=lambda *flags: tuple(map(int, flags)))


def dropout_key(seed: int, step: int) -> int:
    """The step's key for dropout masks: SplitMix64 (Steele et al. 2014) of (seed, step), 63 bits."""
    mixed = (seed + (step + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1


EARLY_STOPPING = "early stopping"
OBSERVER = "observer"
ANOTHER_RANK = "SIGTERM on another rank"
"""Why a rank stops that was asked for nothing itself. A stop by a signal begins with SIG."""


def run(trainer: CheckedTrainer, windows: Windows, plan: LoopPlan, progress: Progress, events: LoopEvents) -> str:
    """Train from `progress.step` to the end; return why it stopped.

    One step is always queued ahead of the one that is read, and the next window is made while the device computes.
    A run that early stopping or an observer ended takes no further step, however often it is resumed. Raises
    NumericsError (a non-finite step changed nothing), OutOfMemoryError, and what the events raise.
    """
    if progress.step < plan.total_steps and _patience_ran_out(plan, progress):
        events.note(f"early stopping ended the run after step {progress.step}; no further step is taken")
        return EARLY_STOPPING
    if progress.step < plan.total_steps and progress.steering.has_stopped(progress.step):
        events.note(f"an observer ended the run after step {progress.step}; no further step is taken")
        return OBSERVER
    loop = _Loop(trainer, windows, plan, progress, events)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows") as maker:
        ahead = maker.submit(windows.window, progress.step)
        while progress.step < plan.total_steps:
            window = ahead.result()
            following = progress.step + 1
            if following < plan.total_steps:
                ahead = maker.submit(windows.window, following)
            loop.queue(window)
            if stopped := loop.pause_after(following):
                return stopped
    loop.settle()
    return "finished"


@dataclass(slots=True)
class _Queued:
    """A step under way; it lasts until the next one is queued, which is when its device work ends at the latest."""

    step: int
    pending: PendingStep
    window: Sequence[Batch]
    learning_rate: float
    started: float


class _Loop:
    def __init__(
        self, trainer: CheckedTrainer, windows: Windows, plan: LoopPlan, progress: Progress, events: LoopEvents
    ) -> None:
        self._trainer = trainer
        self._windows = windows
        self._plan = plan
        self._progress = progress
        self._events = events
        self._queued: _Queued | None = None

    def queue(self, window: list[Batch]) -> None:
        """Queue the next step, then read the one before it."""
        started = time.perf_counter()
        step = self._progress.step
        rate = self._plan.schedule.learning_rate(step) * self._progress.steering.factor(step)
        training = self._plan.training
        settings = StepSettings(
            learning_rate=rate,
            denominator=float(self._windows.token_count(step)),
            dropout_key=dropout_key(self._plan.seed, step),
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm or None,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
        )
        pending = None
        while pending is None:  # as often as memory runs out: the window's meaning stays the same
            fitted = split_rows(window, self._progress.micro_batch_splits)
            try:
                pending = self._trainer.train_step(fitted, replace(settings, epsilon=self._epsilon(fitted)))
            except OutOfMemoryError:
                [divisible] = self._plan.how_many_ranks(any(batch.input_ids.shape[0] > 1 for batch in fitted))
                if not divisible:
                    raise
                self._halve_micro_batches(window)
        before, self._queued = self._queued, _Queued(step, pending, window, rate, started)
        if before is not None:
            self._read(before, ended=started)
        self._progress.step = step + 1

    def settle(self) -> None:
        """Read what is still queued."""
        queued, self._queued = self._queued, None
        if queued is not None:
            self._read(queued)

    def pause_after(self, step: int) -> str:
        """Evaluate, save or stop where the plan says so; returns the reason to stop, or nothing."""
        plan = self._plan
        stop = plan.stop_requested()
        stopping, saving = plan.how_many_ranks(bool(stop), plan.save_requested())
        if stopping and not stop:
            stop = ANOTHER_RANK
        is_last, steering = step == plan.total_steps, self._progress.steering
        evaluates = self._evaluates(step)
        stop = stop or self._stop_by_observer(step)
        saves = bool(saving) or bool(plan.save_steps and step % plan.save_steps == 0) or is_last or bool(stop)
        saves = saves or steering.is_due(SAVE, step)
        if not (evaluates or saves or stop):
            return ""
        self.settle()  # a step that was not finite must never reach a checkpoint
        if evaluates and not is_last:
            patience_ran_out = self._evaluate(step)
            stop = stop or (EARLY_STOPPING if patience_ran_out else self._stop_by_observer(step))
            saves = saves or bool(stop) or steering.is_due(SAVE, step)
        if saves:
            self._events.save(step, self._progress)
        return stop

    def _stop_by_observer(self, step: int) -> str:
        return OBSERVER if self._progress.steering.is_due(STOP, step) and step < self._plan.total_steps else ""

    def _evaluates(self, step: int) -> bool:
        every, asked = self._plan.training.eval_steps, self._progress.steering.is_due(EVALUATE, step)
        if self._plan.evaluation is None:
            if asked:
                self._events.note(f"step {step}: an observer asked for an evaluation, and there are no validation rows")
            return False
        return asked or bool(every and step % every == 0)

    def _evaluate(self, step: int) -> bool:
        """Whether patience has run out."""
        assert self._plan.evaluation is not None
        evaluation = self._plan.evaluation()
        keep_best(self._trainer, self._progress, self._events, step, evaluation)
        self._heed(self._events.evaluated(step, evaluation, "during"), step)
        return _patience_ran_out(self._plan, self._progress)

    def _heed(self, control: Control | None, after: int) -> None:
        """What an observer asked for takes hold once `after` steps are taken."""
        if control is None:
            return
        steering, factor = self._progress.steering, control.learning_rate_factor
        if factor is not None:
            peak = self._plan.schedule.peak * steering.factor(after) * factor
            if not SMALLEST_FLOAT32 <= peak <= 1.0:
                self._events.note(
                    f"an observer asked for a peak learning rate of {peak:.3g}; up to 1 is expected, and none changes"
                )
                control = replace(control, learning_rate_factor=None)
        steering.heed(control, after)

    def _epsilon(self, window: Sequence[Batch]) -> float:
        """What the settings say; or, for the whole run, at least the rounding error of its first gradient."""
        training, progress = self._plan.training, self._progress
        if not training.adam_epsilon_from_noise:
            return training.adam_epsilon
        if progress.adam_epsilon is None:
            gradients, dtype = self._trainer.gradients(window), self._plan.compute_dtype
            noise = epsilon_above(gradients, dtype, max_grad_norm=training.max_grad_norm or None)
            progress.adam_epsilon = max(training.adam_epsilon, noise)
            used = f"adam_epsilon is {progress.adam_epsilon:g}"
            self._events.note(f"{used}; the rounding error of the first gradient in {dtype} is about {noise:g}")
        return progress.adam_epsilon

    def _halve_micro_batches(self, window: list[Batch]) -> None:
        self.settle()
        progress = self._progress
        progress.micro_batch_splits += 1
        rows = max(batch.input_ids.shape[0] for batch in split_rows(window, progress.micro_batch_splits))
        self._events.note(
            f"step {progress.step + 1}: out of memory; micro-batches now have at most {rows} rows. The window, and so "
            "the step, is the same."
        )

    def _read(self, queued: _Queued, ended: float | None = None) -> None:
        stats = queued.pending.resolve()
        ended = ended or time.perf_counter()
        if not (stats.applied and math.isfinite(stats.loss_sum) and math.isfinite(stats.grad_norm)):
            raise self._not_finite(queued, stats)
        if queued.step == 0 and stats.grad_norm == 0.0:
            raise _no_gradient()
        real_tokens = self._windows.real_tokens(queued.step)
        self._progress.tokens_seen += real_tokens
        finished = FinishedStep(
            step=queued.step + 1,
            stats=stats,
            learning_rate=queued.learning_rate,
            epoch=self._windows.epoch_of(queued.step + 1),
            seconds=ended - queued.started,
            real_tokens=real_tokens,
            tokens_seen=self._progress.tokens_seen,
        )
        # The step after it is under way, or would be but for a save: a resume must not see the difference.
        self._heed(self._events.step(finished), finished.step + 1)

    def _not_finite(self, queued: _Queued, stats: StepStats) -> NumericsError:
        rows = self._windows.rows_of(queued.step)
        shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        return NumericsError(
            "QH-N01" if not math.isfinite(stats.loss_sum) else "QH-N02",
            f"Step {queued.step + 1}: loss {stats.loss_sum / max(stats.token_count, 1)}, gradient norm "
            f"{stats.grad_norm}; both must be finite. The step was not applied.",
            where=f"rows {shown} of the training data",
            cause="An overflow in the compute dtype; a learning rate, weight decay or lora.alpha that is too high; or "
            "broken base weights.",
            fix="Lower them, or set quantization.compute_dtype to float32 to find the cause.",
            context={"step": queued.step + 1, "rows": rows, "loss_sum": str(stats.loss_sum)},
        )


def _patience_ran_out(plan: LoopPlan, progress: Progress) -> bool:
    patience = plan.training.early_stopping_patience
    return patience is not None and progress.evaluations_without_improvement >= patience


def keep_best(trainer: CheckedTrainer, progress: Progress, events: LoopEvents, step: int, evaluation: LossSum) -> None:
    """Remember the adapter with the lowest evaluation loss; one that is not finite is never the best."""
    is_finite = math.isfinite(evaluation.loss)
    if not is_finite:
        events.note(f"step {step}: the validation loss is {evaluation.loss}; it counts as no improvement")
    if not is_finite or (progress.best_loss is not None and evaluation.loss >= progress.best_loss):
        progress.evaluations_without_improvement += 1
        return
    progress.best_loss, progress.best_step = evaluation.loss, step
    progress.evaluations_without_improvement = 0
    events.best(step, trainer.export_adapter())


def split_rows(window: Sequence[Batch], times: int) -> list[Batch]:
    """Each micro-batch cut in halves of its rows, `times` over. The counted tokens of the window stay the same."""
    batches = list(window)
    for _ in range(times):
        halves: list[Batch] = []
        for batch in batches:
            rows = batch.input_ids.shape[0]
            cuts = (slice(0, rows // 2), slice(rows // 2, rows)) if rows > 1 else (slice(0, rows),)
            halves += [_rows(batch, cut) for cut in cuts]
        batches = halves
    return batches


def _rows(batch: Batch, cut: slice) -> Batch:
    return replace(
        batch,
        input_ids=batch.input_ids[cut],
        labels=batch.labels[cut],
        position_ids=batch.position_ids[cut],
        segment_ids=batch.segment_ids[cut],
        rows=None if batch.rows is None else batch.rows[cut],
        weights=None if batch.weights is None else batch.weights[cut],
    )


def _no_gradient() -> NumericsError:
    return NumericsError(
        "QH-C18",
        "The first step's gradient norm is 0: no gradient reaches the adapter.",
        cause="A kernel without a backward, checkpointing that cuts the graph, a lora.alpha so small that the product "
        "vanishes, or a lora.dropout so near 1 that nothing is kept.",
        fix="Run qlora-hal doctor to check the backend's gradients.",
    )
