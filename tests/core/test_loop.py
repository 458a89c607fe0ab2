"""The loop with a trainer that does arithmetic on plain numbers: order, lateness, refusals, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from qlora_hal.config.schema import TrainingConfig
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, LossSum, StepSettings, StepStats
from qlora_hal.errors import NumericsError, OutOfMemoryError
from qlora_hal.run.gradient_noise import ROUNDINGS
from qlora_hal.run.loop import FinishedStep, LoopPlan, Progress, dropout_key, run, split_rows
from qlora_hal.run.lr_schedule import Schedule


def batch(rows: int = 4, time: int = 3) -> Batch:
    ids = np.ones((rows, time), np.int32)
    return Batch(ids, ids, ids, ids)


@dataclass
class Windows:
    rows: int = 4

    def window(self, step: int) -> list[Batch]:
        return [batch(self.rows), batch(self.rows)]

    def token_count(self, step: int) -> int:
        return sum(batch.counted_tokens for batch in self.window(step))

    def real_tokens(self, step: int) -> int:
        return sum(int(batch.segment_ids.astype(bool).sum()) for batch in self.window(step))

    def rows_of(self, step: int) -> list[int]:
        return [10 * step, 10 * step + 1]

    def epoch_of(self, step: int) -> float:
        return step / 10


@dataclass
class Trainer:
    """Losses by call; `largest` is how many rows fit into memory."""

    losses: dict[int, float] = field(default_factory=dict)
    largest: int = 99
    log: list[str] = field(default_factory=list)
    settings: list[StepSettings] = field(default_factory=list)

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> object:
        if any(b.input_ids.shape[0] > self.largest for b in window):
            raise OutOfMemoryError("QH-N07", "full", fix="less")
        number = len(self.settings)
        self.settings.append(settings)
        self.log.append(f"queue {number} rows {[b.input_ids.shape[0] for b in window]}")
        return _Pending(self, number, sum(b.counted_tokens for b in window))

    def export_adapter(self) -> Adapter:
        return Adapter({}, AdapterConfig(1, 1.0))

    def gradients(self, window: Sequence[Batch]) -> dict[str, np.ndarray]:
        self.log.append("gradients")
        return {"lora_A": np.zeros((2, 3), np.float32), "lora_B": np.full((3, 2), 0.25, np.float32)}


@dataclass
class _Pending:
    trainer: Trainer
    number: int
    tokens: int

    def resolve(self) -> StepStats:
        self.trainer.log.append(f"read {self.number}")
        loss = self.trainer.losses.get(self.number, 1.0)
        return StepStats(loss * self.tokens, self.tokens, 1.0, bool(np.isfinite(loss)))


@dataclass
class Events:
    log: list[str]
    steps: list[FinishedStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, finished: FinishedStep) -> None:
        self.steps.append(finished)

    def evaluated(self, step: int, evaluation: LossSum, label: str) -> None:
        self.log.append(f"evaluated {step}")

    def save(self, step: int, progress: Progress) -> None:
        self.log.append(f"saved {step}")

    def best(self, step: int, adapter: Adapter) -> None:
        self.log.append(f"best {step}")

    def note(self, text: str) -> None:
        self.notes.append(text)


def carried_out(trainer: Trainer, total: int, progress: Progress | None = None, **plan: object) -> tuple[str, Events]:
    events = Events(trainer.log)
    training = TrainingConfig(**plan.pop("training", {}))  # type: ignore[arg-type]
    made = LoopPlan(
        total_steps=total,
        seed=1,
        schedule=Schedule("linear", 1.0, 0, total),
        training=training,
        save_steps=plan.pop("save_steps", None),  # type: ignore[arg-type]
        **plan,  # type: ignore[arg-type]
    )
    progress = progress or Progress()
    return run(trainer, Windows(), made, progress, events), events  # type: ignore[arg-type]


def test_each_step_is_read_after_the_next_is_queued() -> None:
    trainer = Trainer()
    ended, events = carried_out(trainer, 3)
    assert ended == "finished"
    order = [entry.split(" rows")[0] for entry in trainer.log]
    assert order == ["queue 0", "queue 1", "read 0", "queue 2", "read 1", "read 2", "saved 3"]
    assert [step.step for step in events.steps] == [1, 2, 3]


def test_learning_rate_and_tokens_are_those_of_this_step() -> None:
    trainer = Trainer()
    _, events = carried_out(trainer, 4)
    assert [s.learning_rate for s in trainer.settings] == [1.0, 0.75, 0.5, 0.25]
    assert [step.learning_rate for step in events.steps] == [1.0, 0.75, 0.5, 0.25]
    assert {s.denominator for s in trainer.settings} == {2 * 4 * 2}  # two batches, four rows, two counted of three


@pytest.mark.fault("N02")
@pytest.mark.fault("N01")
def test_step_that_is_not_finite_stops_before_it_is_saved_and_names_its_rows() -> None:
    trainer = Trainer(losses={2: float("nan")})
    with pytest.raises(NumericsError) as stop:
        carried_out(trainer, 9, save_steps=3)
    assert stop.value.code == "QH-N01"
    assert stop.value.exit_status == 6
    assert "Step 3" in stop.value.message
    assert "rows 20, 21" in stop.value.where
    assert not any(entry.startswith("saved") for entry in trainer.log)


@pytest.mark.fault("N07", "N08", "N09")
@pytest.mark.fault("N06")
def test_out_of_memory_halves_micro_batches_and_keeps_the_window() -> None:
    trainer = Trainer(largest=1)
    _, events = carried_out(trainer, 2)
    assert [entry for entry in trainer.log if entry.startswith("queue")] == [
        f"queue {step} rows [1, 1, 1, 1, 1, 1, 1, 1]" for step in range(2)
    ]
    assert {s.denominator for s in trainer.settings} == {16}
    assert len(events.notes) == 2
    assert "at most 1 rows" in events.notes[-1]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OutOfMemoryError):
        carried_out(Trainer(largest=0), 2)


def test_patience_stops_after_evaluations_without_improvement() -> None:
    losses = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    ended, events = carried_out(
        Trainer(),
        20,
        evaluation=lambda: LossSum(next(losses), 1),
        training={"eval_steps": 2, "early_stopping_patience": 2},
    )
    assert ended == "early stopping"
    assert [entry for entry in events.log if "best" in entry] == ["best 2", "best 4"]
    assert events.log[-1] == "saved 8"


def test_an_evaluation_that_is_not_finite_is_never_the_best() -> None:
    losses = iter([float("nan"), 3.0, float("inf"), 2.0])
    progress = Progress()
    _, events = carried_out(
        Trainer(), 10, progress=progress, evaluation=lambda: LossSum(next(losses), 1), training={"eval_steps": 2}
    )
    assert [entry for entry in events.log if "best" in entry] == ["best 4", "best 8"]
    assert progress.best_loss == 2.0
    assert events.notes == [
        "step 2: the validation loss is nan; it counts as no improvement",
        "step 6: the validation loss is inf; it counts as no improvement",
    ]


def test_evaluations_of_which_none_is_finite_have_no_best_and_wear_patience_out() -> None:
    progress = Progress()
    ended, events = carried_out(
        Trainer(),
        20,
        progress=progress,
        evaluation=lambda: LossSum(float("nan"), 1),
        training={"eval_steps": 2, "early_stopping_patience": 2},
    )
    assert ended == "early stopping"
    assert (progress.best_loss, progress.best_step) == (None, None)
    assert events.log[-1] == "saved 4"


def test_patience_that_ran_out_before_a_resume_stays_out() -> None:
    trainer = Trainer()
    ended, events = carried_out(
        trainer,
        20,
        progress=Progress(step=8, best_loss=2.0, best_step=4, evaluations_without_improvement=2),
        evaluation=lambda: LossSum(1.0, 1),
        training={"eval_steps": 2, "early_stopping_patience": 2},
    )
    assert ended == "early stopping"
    assert trainer.settings == []
    assert events.notes == ["early stopping ended the run after step 8; no further step is taken"]


def test_request_to_stop_finishes_the_step_and_saves() -> None:
    trainer = Trainer()
    ended, events = carried_out(trainer, 9, stop_requested=lambda: "SIGTERM" if len(trainer.settings) == 4 else "")
    assert ended == "SIGTERM"
    assert trainer.log[-2:] == ["read 3", "saved 4"]
    assert len(events.steps) == 4


def test_dropout_keys_never_repeat_within_a_run() -> None:
    keys = {dropout_key(seed, step) for seed in range(20) for step in range(500)}
    assert len(keys) == 20 * 500
    assert all(0 <= key < 2**63 for key in keys)


def test_progress_survives_json() -> None:
    progress = Progress(7, 99, 1.5, 4, 1, 2)
    assert Progress.from_json(progress.as_json()) == progress


def test_split_keeps_every_row_in_order() -> None:
    arrays = [np.arange(10, dtype=np.int32).reshape(5, 2) for _ in range(4)]
    one = Batch(*arrays, rows=np.arange(7, 12, dtype=np.int32), weights=np.ones((5, 2), np.float32))
    parts = split_rows([one], 2)
    assert [part.input_ids.shape[0] for part in parts] == [1, 1, 1, 2]
    for name in ("input_ids", "rows", "weights"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(one, name))


FROM_NOISE = {"adam_epsilon_from_noise": True, "max_grad_norm": 0.0}


def test_epsilon_from_noise_is_measured_once_and_holds_for_every_step() -> None:
    trainer = Trainer()
    _, events = carried_out(trainer, 3, training=FROM_NOISE, compute_dtype="bfloat16")
    assert [settings.epsilon for settings in trainer.settings] == [ROUNDINGS * 2.0**-8 * 0.25] * 3
    assert trainer.log.count("gradients") == 1
    assert [note for note in events.notes if "adam_epsilon is 0.015625" in note]


def test_epsilon_from_noise_is_never_below_the_one_that_was_set() -> None:
    trainer = Trainer()
    carried_out(trainer, 1, training={**FROM_NOISE, "adam_epsilon": 0.5})
    assert trainer.settings[0].epsilon == 0.5


def test_a_resumed_run_keeps_the_epsilon_that_was_measured() -> None:
    trainer, progress = Trainer(), Progress(adam_epsilon=0.125, step=1)
    carried_out(trainer, 2, Progress.from_json(progress.as_json()), training=FROM_NOISE)
    assert [settings.epsilon for settings in trainer.settings] == [0.125]
    assert "gradients" not in trainer.log


def test_without_the_option_no_gradient_is_looked_at() -> None:
    trainer = Trainer()
    carried_out(trainer, 2, training={"adam_epsilon": 1e-6})
    assert [settings.epsilon for settings in trainer.settings] == [1e-6] * 2
    assert "gradients" not in trainer.log
