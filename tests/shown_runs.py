"""A run of ten steps that a console can show. Tests only."""

from __future__ import annotations

from pathlib import Path

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.values import StepStats
from qlora_hal.report.console import RunConsole
from qlora_hal.run.result import RunView, TrainResult


def view(logging_steps: int = 1) -> RunView:
    config = RunConfig.model_validate({"training": {"logging_steps": logging_steps}})
    return RunView(Path("runs/a"), config, {"weight_format": "nf4", "compute_dtype": "float32"}, total_steps=10)


def show_steps(console: RunConsole, run: RunView, *, applied: bool = True) -> None:
    for step in range(1, run.total_steps + 1):
        console.step(
            run,
            step,
            StepStats(100.0, 50, 0.5, applied),
            learning_rate=1e-4,
            tokens_per_second=1234.0,
            seconds_per_step=0.25,
            epoch=step / 10,
            tokens_seen=step * 60,
            memory_bytes=2**30,
            memory_limit=2**33,
            eta_seconds=2.5,
        )


def result(stopped_because: str = "finished") -> TrainResult:
    return TrainResult(
        backend="cpu_torch",
        device="CPU",
        weight_format="nf4",
        block_size=64,
        run_dir=Path("runs/my run"),
        adapter_dir=Path("runs/my run/adapter"),
        steps=10,
        tokens=600,
        losses=((1, 3.0), (10, 2.0)),
        eval_loss_before=3.5,
        eval_loss_after=2.5,
        wall_seconds=2.5,
        peak_memory_bytes=2**30,
        stopped_because=stopped_because,
        tokens_per_second=240.0,
    )
