"""What observers of a run are shown, and what `train` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class RunView:
    """The facts of a run that do not change while it trains.

    `resolved` is what `run.json` holds: backend, device, weight format, block size, compute dtype, versions.
    """

    run_dir: Path
    config: RunConfig
    resolved: Mapping[str, object]
    total_steps: int
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished (or stopped) run gives back.

    `losses` is (step, mean loss per counted token) for every step of this call; `stopped_because` is `finished`,
    `early stopping`, or the signal's name. `tokens` counts the whole run without padding, `tokens_per_second` only the
    training steps of this call. `plan` is what a dry run found out: steps, sequences, memory in bytes by cause.
    """

    backend: str
    device: str
    weight_format: str
    block_size: int | None
    run_dir: Path
    adapter_dir: Path
    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    eval_loss_before: float | None
    eval_loss_after: float | None
    wall_seconds: float
    peak_memory_bytes: int | None
    stopped_because: str
    tokens_per_second: float | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[Mapping[str, str], ...] = field(default=())
    plan: Mapping[str, object] = field(default_factory=dict)

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the run was told to stop and can go on; else it has ended, and its adapter is written."""
        return self.stopped_because.startswith("SIG")
