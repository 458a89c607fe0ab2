"""One rank of a test of `mlx_lora`: `python -m one_mlx_rank FOLDER`, by the backend's launcher. Tests only.

`task.json` in the folder says what to do; what the rank found is left in `rank-N.npz` or `rank-N.json` beside it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import IGNORE_LABEL, AdapterConfig, Batch, StepSettings, StepStats
from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError, OutOfMemoryError
from qlora_hal.ranks.identity import world_here

SECONDS = 120.0
STEPS = 3


def opened(model: Path, world: World) -> Any:
    from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

    trainer = MLXLoRATrainer()
    if world.size > 1:
        trainer.join_ranks(world, SECONDS)
    trainer.load(source_of(model), Quantization(WeightFormat("none")), Compute(options={"compile": "off"}, world=world))
    modules = trainer.linear_modules()
    trainer.attach(moved_adapter(AdapterConfig(4, 8.0, 0.1, False, tuple(sorted(modules))), modules))
    return trainer


def numbered(batches: Sequence[Batch]) -> list[Batch]:
    """With the place of each row in the window."""
    starts = np.cumsum([0, *(len(batch.labels) for batch in batches)])
    return [
        replace(batch, rows=np.arange(start, start + len(batch.labels), dtype=np.int32))
        for start, batch in zip(starts, batches, strict=False)
    ]


def step_shares(step: int) -> list[list[Batch]]:
    """A micro-batch for each of two ranks, of different lengths and counts."""
    first, second = numbered([random_batch(step, padding=4), random_batch(100 + step, time=12, prompt=7)])
    return [[first], [second]]


def uneven_shares() -> list[list[Batch]]:
    """Three micro-batches for the first rank; for the second one without a counted token, and one more."""
    mute = random_batch(7)
    mute = replace(mute, labels=np.full_like(mute.labels, IGNORE_LABEL))
    batches = numbered([random_batch(1), random_batch(2, padding=9), random_batch(3, rows=1), mute, random_batch(4)])
    return [batches[:3], batches[3:]]


def idle_shares() -> list[list[Batch]]:
    return [numbered([random_batch(5)]), []]


def stepped(trainer: Any, share: Sequence[Batch], window: Sequence[Batch], step: int) -> StepStats:
    count = sum(batch.counted_tokens for batch in window)
    stats: StepStats = trainer.train_step(share, StepSettings(1e-2, count, dropout_key=step + 1)).resolve()
    return stats


def figures(stats: StepStats) -> list[float]:
    return [stats.loss_sum, stats.token_count, stats.grad_norm, stats.applied]


def whole(shares: Sequence[Sequence[Batch]]) -> list[Batch]:
    return [batch for share in shares for batch in share]


# tasks ---------------------------------------------------------------------------------------------------------------
def sums(task: Mapping[str, Any], world: World, leave: Path) -> None:
    from qlora_hal_backends.mlx_lora.ranks import Ranks

    ranks = Ranks.join(world, SECONDS)
    np.savez(leave.with_suffix(".npz"), found=ranks.sum_on_host(np.array(task["values"][world.rank], np.float64)))


def steps(task: Mapping[str, Any], world: World, leave: Path) -> None:
    """Gradients and steps; one attempt in which rank 1 runs out of memory, and at the end a step that it spoils."""
    trainer = opened(Path(task["model"]), world)
    found: dict[str, Any] = {}
    for name, shares in (("uneven", uneven_shares()), ("idle", idle_shares())):
        gradients = trainer.gradients(shares[world.rank])
        found |= {f"{name}/{tensor}": values for tensor, values in gradients.items()}
    for step in range(STEPS):
        shares = step_shares(step)
        if step == 1:
            with changed(trainer, world.rank == 1, _runs_out):
                try:
                    stepped(trainer, shares[world.rank], whole(shares), step)
                except OutOfMemoryError as error:
                    found["out_of_memory"] = f"{error.code} {error.message}"
        found[f"figures/{step}"] = figures(stepped(trainer, shares[world.rank], whole(shares), step))
    found |= {f"adapter/{name}": values for name, values in trainer.export_adapter().tensors.items()}
    with changed(trainer, world.rank == 1, _spoilt):
        found["spoilt"] = figures(stepped(trainer, step_shares(9)[world.rank], whole(step_shares(9)), 9))
    found |= {f"after/{name}": values for name, values in trainer.export_adapter().tensors.items()}
    np.savez(leave.with_suffix(".npz"), **found)


class changed:
    """The gradient of a rank's own window, changed for a while, if it is this rank's turn."""

    def __init__(self, trainer: Any, applies: bool, change: Callable[[Any], Any]) -> None:
        self._gradient, self._applies, self._change = trainer._attached.gradient, applies, change

    def __enter__(self) -> None:
        if self._applies:
            self._gradient.of_window = self._change(self._gradient.of_window)

    def __exit__(self, *_: object) -> None:
        if self._applies:
            del self._gradient.of_window


def _runs_out(_: Any) -> Any:
    def of_window(*_: Any) -> Any:
        raise RuntimeError("unable to allocate 1 bytes")

    return of_window


def _spoilt(of_window: Any) -> Any:
    def spoilt(*given: Any) -> Any:
        gradients, total = of_window(*given)
        return [gradient * float("nan") for gradient in gradients], total

    return spoilt


def leaves(task: Mapping[str, Any], world: World, leave: Path) -> None:
    """Rank 1 is killed, or hangs, after the first meeting; rank 0 waits for it."""
    from qlora_hal_backends.mlx_lora.ranks import Ranks

    ranks = Ranks.join(world, SECONDS)
    ranks.sum_on_host(np.ones(1))
    if world.rank == 1:
        if task["how"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SECONDS)
    ranks.timeout_seconds = task["timeout_seconds"]
    try:
        ranks.sum_on_host(np.ones(1))
    except BackendError as error:
        leave.with_suffix(".json").write_text(json.dumps([error.code, error.message, error.cause]), encoding="utf-8")
        sys.exit(1)


def alone(task: Mapping[str, Any], world: World, leave: Path) -> None:
    """Rank 1 never comes."""
    from qlora_hal_backends.mlx_lora.ranks import Ranks

    if world.rank == 1:
        return
    started = time.monotonic()
    try:
        Ranks.join(world, task["timeout_seconds"])
    except BackendError as error:
        told = [error.code, error.message, time.monotonic() - started]
        leave.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")


def waits(task: Mapping[str, Any], world: World, leave: Path) -> None:
    """Until a signal comes, of which it tells."""

    def tell(number: int, _: object) -> None:
        leave.with_suffix(".json").write_text(json.dumps(signal.Signals(number).name), encoding="utf-8")
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    leave.with_suffix(".ready").touch()
    time.sleep(SECONDS)


def fails(task: Mapping[str, Any], world: World, leave: Path) -> None:
    """Rank 1 fails, as often as the task says; the others wait."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < task["times"]:
        if world.rank == 1:
            sys.exit(7)
        time.sleep(SECONDS)


TASKS = {task.__name__: task for task in (sums, steps, leaves, alone, waits, fails)}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    given = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    TASKS[given["name"]](given, world_here(), folder / f"rank-{world_here().rank}")
