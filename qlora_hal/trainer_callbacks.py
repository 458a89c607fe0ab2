"""A `TrainerCallback` of transformers as an observer of a run: its events that exist here, its wishes that can be met.

`on_train_begin`, `on_log`, `on_evaluate`, `on_save`, `on_step_end`, `on_epoch_begin`, `on_epoch_end` and `on_train_end`
are told, one step late as all observers are. `should_training_stop`, `should_save` and `should_evaluate` are heeded as
`qlora_hal.Control` says. Nothing is ever predicted or pushed by a run, and the batches of an evaluation are not told
one by one, so `on_predict`, `on_push_begin` and `on_prediction_step` are not called. What would have to happen inside a
step is refused, as are the model, the optimizer and the data loaders, which no backend shares.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.hooks import Control, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qlora_hal.contract.values import LossSum, StepStats
    from qlora_hal.run.result import RunView

INSIDE_A_STEP = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
_ROUNDING = 1e-9
NOT_SHARED = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")


def as_observer(callback: object) -> CallbackObserver:
    """The observer for `train(observers=[as_observer(callback)])`; `callback` is an instance or its class.

    Raises UnsupportedFeatureError QH-U43 for what is no TrainerCallback, and for one that acts inside a step.
    """
    from transformers import TrainerCallback

    found = callback() if isinstance(callback, type) else callback
    if not isinstance(found, TrainerCallback):
        raise _unfit(f"A value of type {type(found).__name__} is no TrainerCallback of transformers.", "Give one.")
    inside = [name for name in INSIDE_A_STEP if getattr(type(found), name) is not getattr(TrainerCallback, name)]
    if inside:
        raise _unfit(
            f"{type(found).__name__} has {', '.join(inside)}, and a backend takes its optimizer step as a whole.",
            "Use on_step_end, or a setting of the run that does the same.",
        )
    return CallbackObserver(found)


class CallbackObserver:
    """Keeps the arguments, state and control that a callback is given, as transformers' own."""

    def __init__(self, callback: Any) -> None:
        from transformers import TrainerControl, TrainerState

        self._callback = callback
        self._state, self._control = TrainerState(), TrainerControl()
        self._arguments: Any = None

    @hookimpl
    def qlora_hal_run_started(self, run: RunView) -> None:
        self._arguments = _arguments(run)
        self._state.max_steps, self._state.global_step = run.total_steps, run.first_step
        self._state.logging_steps = run.config.training.logging_steps
        self._state.num_train_epochs = math.ceil(run.config.training.num_train_epochs)
        self._state.epoch = 0.0
        self._tell("on_train_begin")
        self._tell("on_epoch_begin")

    @hookimpl
    def qlora_hal_step_finished(
        self, run: RunView, step: int, stats: StepStats, learning_rate: float, epoch: float
    ) -> None:
        self._state.global_step, self._state.epoch = step, epoch
        self._tell("on_step_end")
        if step % run.config.training.logging_steps == 0:
            self._log({"loss": stats.loss, "grad_norm": stats.grad_norm, "learning_rate": learning_rate})
        if _ends_an_epoch(step, epoch):
            self._tell("on_epoch_end")
            if step < run.total_steps:
                self._tell("on_epoch_begin")

    @hookimpl
    def qlora_hal_evaluated(self, step: int, evaluation: LossSum, metrics: Mapping[str, float]) -> None:
        figures = {"eval_loss": evaluation.loss, **{f"eval_{name}": value for name, value in metrics.items()}}
        self._state.global_step = step
        self._log(figures)
        self._tell("on_evaluate", metrics=figures)
        best = self._state.best_metric
        if best is None or evaluation.loss < best:
            self._state.best_metric, self._state.best_global_step = evaluation.loss, step

    @hookimpl
    def qlora_hal_checkpoint_saved(self, path: Path) -> None:
        self._tell("on_save")

    @hookimpl
    def qlora_hal_run_finished(self) -> None:
        self._tell("on_train_end")

    @hookimpl
    def qlora_hal_control(self) -> Control | None:
        wishes = self._control
        if wishes.should_epoch_stop:
            raise _unfit("should_epoch_stop was set, and a run here has steps alone.", "Use should_training_stop.")
        asked = Control(stop=wishes.should_training_stop, save=wishes.should_save, evaluate=wishes.should_evaluate)
        wishes.should_save = wishes.should_evaluate = False
        return asked if asked != Control() else None

    def _log(self, logs: dict[str, float]) -> None:
        logs = {**logs, "epoch": self._state.epoch or 0.0}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._tell("on_log", logs=logs)

    def _tell(self, event: str, **facts: object) -> None:
        absent = {name: _Absent(type(self._callback).__name__, name) for name in NOT_SHARED}
        call = getattr(self._callback, event)
        answer = call(self._arguments, self._state, self._control, **absent, **facts)
        self._control = answer if answer is not None else self._control


class _Absent:
    """In the place of what no backend shares: whatever is asked of it is refused by name."""

    def __init__(self, callback: str, name: str) -> None:
        self._refusal = f"{callback} uses {name}, which is the backend's own."

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # looked for by copy, pickle and the like
            raise AttributeError(name)
        raise _unfit(self._refusal, "Leave the callback out, or write an observer.")


def _ends_an_epoch(step: int, epoch: float) -> bool:
    """Whether a step is the last one of an epoch; told by the step alone, for a resumed run begins within one."""
    before = epoch * (step - 1) / step
    return math.floor(epoch + _ROUNDING) > math.floor(before + _ROUNDING)


def _arguments(run: RunView) -> Any:
    """The settings of the run in transformers' words. Some callbacks refuse to work without them."""
    from transformers import TrainingArguments

    training = run.config.training
    arguments = TrainingArguments(
        output_dir=str(run.run_dir),
        learning_rate=training.learning_rate,
        max_steps=run.total_steps,
        num_train_epochs=training.num_train_epochs,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        logging_steps=training.logging_steps,
        eval_strategy="steps" if training.eval_steps else "no",
        eval_steps=training.eval_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        report_to="none",
    )
    # Given to the constructor it would ask for a save at each evaluation, which a run here does not need for it.
    arguments.load_best_model_at_end = training.load_best_adapter_at_end
    return arguments


def _unfit(problem: str, fix: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError("QH-U43", problem, where="observers", fix=fix)
