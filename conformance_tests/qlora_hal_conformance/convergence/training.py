"""One run of a seed: the adapter's A, the order of rows and the dropout masks are the seed's, all else is settled.

Runs go through the contract's trainer directly, several in one process on one loaded base: `attach` puts a fresh
adapter and a fresh optimizer on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, StepSettings
from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.run.loop import dropout_key
from qlora_hal.run.lr_schedule import Schedule
from qlora_hal_conformance.convergence.tasks import TokenTask, batch_of


@dataclass(frozen=True, slots=True)
class Settings:
    """What is equal in all runs of a model and task. A window is `micro_batches` of `rows` each.

    The rate is constant, so the loss still falls at the last step: a run that learns a little faster or slower than
    another ends at another loss, which a run to the bottom would hide.
    """

    steps: int
    learning_rate: float
    rows: int = 4
    micro_batches: int = 2
    warmup_steps: int = 2
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def as_json(self) -> dict[str, int | float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """`loss` is the mean over the counted held-out tokens after the last step, in nats; `losses` those of the steps."""

    seed: int
    loss: float
    losses: tuple[float, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Plan:
    """A task in tokens, and how it is trained."""

    task: TokenTask
    settings: Settings

    def windows(self, seed: int) -> list[list[Batch]]:
        """The micro-batches of each step; no row comes twice. Raises ValueError where the task has too few rows."""
        s = self.settings
        needed = s.steps * s.rows * s.micro_batches
        if needed > len(self.task.trained):
            raise ValueError(f"{s.steps} steps need {needed} rows, and the task has {len(self.task.trained)}")
        order = permutation(len(self.task.trained), seed, Purpose.ROWS)[:needed]
        rows = [self.task.trained[place] for place in order]
        per_window = s.rows * s.micro_batches
        return [
            [
                batch_of(rows[start + first : start + first + s.rows], self.task.pad_id, first)
                for first in range(0, per_window, s.rows)
            ]
            for start in range(0, needed, per_window)
        ]

    def held_out(self) -> list[Batch]:
        """The held-out rows, the shortest first so that little is padding."""
        rows = sorted(self.task.held_out, key=lambda row: len(row.ids))
        size = 4 * self.settings.rows
        return [batch_of(rows[first : first + size], self.task.pad_id) for first in range(0, len(rows), size)]

    def sha256(self, seeds: Sequence[int] = (0,)) -> str:
        """Of the tokens, labels and order of some seeds, and of what is held out: equal where the data are."""
        digest = hashlib.sha256()
        for batch in (*self.held_out(), *(b for seed in seeds for window in self.windows(seed) for b in window)):
            digest.update(repr(batch.input_ids.shape).encode())
            digest.update(batch.input_ids.astype("<i4").tobytes() + batch.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    def step_settings(self, seed: int, step: int, window: Sequence[Batch]) -> StepSettings:
        """As the core's loop would hand them in."""
        s = self.settings
        return StepSettings(
            learning_rate=Schedule("constant", s.learning_rate, s.warmup_steps, s.steps).learning_rate(step),
            denominator=float(sum(batch.counted_tokens for batch in window)),
            dropout_key=dropout_key(seed, step),
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
        )


def run_seed(trainer: CheckedTrainer, plan: Plan, seed: int) -> Run:
    """Train one adapter from its beginning to the end. Raises what the trainer raises; a loss that is not finite is
    told, not hidden: it is the run's loss."""
    trainer.attach(first_adapter(trainer, plan.settings, seed), "adamw")
    losses: list[float] = []
    for step, window in enumerate(plan.windows(seed)):
        stats = trainer.train_step(window, plan.step_settings(seed, step, window)).resolve()
        losses.append(stats.loss if stats.applied else math.nan)
    ended = trainer.evaluate(plan.held_out()).loss
    return Run(seed, ended if all(map(math.isfinite, losses)) else math.nan, tuple(losses))


def first_adapter(trainer: CheckedTrainer, settings: Settings, seed: int) -> Adapter:
    """The seed's A, and B = 0, on every linear layer."""
    modules = trainer.linear_modules()
    targets = tuple(sorted(modules))
    config = AdapterConfig(settings.rank, settings.alpha, settings.dropout, target_modules=targets)
    return initial_adapter(config, modules, seed)


def run_seeds(
    trainer: CheckedTrainer, plan: Plan, seeds: Sequence[int], told: Callable[[Run], None] = lambda run: None
) -> tuple[float, list[Run]]:
    """The held-out loss of the base alone, which is that of any seed while B is 0, and one run after another on the
    same loaded base; `told` hears of each as it ends."""
    trainer.attach(first_adapter(trainer, plan.settings, seeds[0]), "adamw")
    before, runs = trainer.evaluate(plan.held_out()).loss, []
    for seed in seeds:
        runs.append(run_seed(trainer, plan, seed))
        told(runs[-1])
    return before, runs
