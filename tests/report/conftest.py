"""A run folder as the real writers leave it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.contract.values import LossSum, StepStats
from qlora_hal.report.metrics import MetricsFile, evaluation_record, step_record
from qlora_hal.report.run_file import Detection, RunRecord, write_run_file

STEPS = 40
HOSTILE = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "first-run"
    folder.mkdir()
    write_metrics(folder / "metrics.jsonl")
    write_run_file(folder, run_record())
    return folder


def write_metrics(path: Path) -> None:
    with MetricsFile(path) as metrics:
        metrics.append(evaluation_record(0, LossSum(300.0, 100), "before"))
        for step in range(1, STEPS + 1):
            loss = math.nan if step == 7 else 1 + 2 / step
            metrics.append(
                step_record(
                    step,
                    StepStats(loss * 50, 50, 0.5, applied=step != 7),
                    learning_rate=1e-3 / step,
                    epoch=step / 20,
                    tokens_seen=step * 60,
                    tokens_per_second=600.0 + step,
                    seconds_per_step=0.1,
                    memory_bytes=2**30,
                )
            )
        metrics.append(evaluation_record(STEPS, LossSum(110.0, 100), "after"))


def run_record() -> RunRecord:
    settings = resolve_settings({"lora": {"r": 8}, "model": {"name_or_path": HOSTILE}}, environ={})
    reports = [
        ProbeReport("cpu_torch", Availability.READY, "ready", devices=("a processor",)),
        ProbeReport("cuda_bnb", Availability.NO_DEVICE, "no NVIDIA driver answers", "install the driver"),
    ]
    return RunRecord(
        config=settings.config.model_dump(mode="json"),
        origins=settings.origins,
        resolved={"backend": "cpu_torch", "device": "a processor", "weight_format": "nf4", "block_size": 64},
        detection=Detection.of("cpu_torch", "named by the user", reports, {"cuda_bnb": "it is not ready"}),
        data_report={"rows_read": 812, "dropped": {"too_long": 3}, "lines": ["median 41 tokens", "longest 90 tokens"]},
        status="finished",
        stopped_because="finished",
        steps=STEPS,
        tokens=STEPS * 60,
        eval_loss_before=3.0,
        eval_loss_after=1.1,
        samples=({"prompt": HOSTILE, "before": "before the run", "after": "after the run"},),
        timings={"train_seconds": 12.0},
        peak_memory_bytes=2**30,
        notes=("A note on the run.",),
    )
