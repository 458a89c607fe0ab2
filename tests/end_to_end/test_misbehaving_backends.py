"""Runs on a backend that is right in all but one thing: they end as they should, and say what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from installed_plugins import install
from small_runs import SMALL, merged, small_run

from qlora_hal import resume
from qlora_hal.contract.values import LossSum
from qlora_hal.demo import data_path
from qlora_hal.errors import BackendError
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

JUDGED: dict[str, Any] = {
    "data.validation_path": str(data_path("validation")),
    "training.max_steps": 4,
    "training.eval_steps": 1,
    "training.load_best_adapter_at_end": True,
    "checkpoint.save_steps": 2,
}


@pytest.mark.parametrize(("finite", "best_step"), [((), None), ((2, 3), 2)])
def test_evaluations_that_are_not_finite_leave_a_run_that_can_be_read_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finite: tuple[int, ...], best_step: int | None
) -> None:
    done: list[int] = []

    def evaluate(self: TorchLoRATrainer, batches: Any) -> LossSum:
        done.append(len(done))
        tokens = sum(batch.counted_tokens for batch in batches)
        return LossSum(float(tokens * done[-1]) if done[-1] in finite else float("nan"), tokens)

    monkeypatch.setattr(TorchLoRATrainer, "evaluate", evaluate)
    result = small_run(tmp_path / "run", JUDGED)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["best_step"], record["status"]) == (best_step, "finished")
    assert record["eval_loss_before"] is None
    assert any("the validation loss is nan" in note for note in result.notes)
    assert not any("worse than the base" in note for note in result.notes)
    assert resume(tmp_path / "run").steps == 4


@pytest.fixture
def failing_close(monkeypatch: pytest.MonkeyPatch) -> None:
    close = TorchLoRATrainer.close

    def fail(self: TorchLoRATrainer) -> None:
        is_loaded = self._base is not None
        close(self)
        if is_loaded:
            raise RuntimeError("the driver is gone")

    monkeypatch.setattr(TorchLoRATrainer, "close", fail)


NOTE = "note: the device may not be free yet: Backend cpu_torch failed in close: RuntimeError: the driver is gone"


@pytest.mark.usefixtures("failing_close")
def test_a_failing_close_does_not_fail_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(tmp_path / "run", {"training.max_steps": 1}).stopped_because == "finished"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert NOTE in capsys.readouterr().err


@pytest.mark.usefixtures("failing_close")
def test_a_failing_close_does_not_hide_what_ended_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(self: TorchLoRATrainer, *window: object) -> None:
        sys.exit(0)

    monkeypatch.setattr(TorchLoRATrainer, "train_step", leave)
    with pytest.raises(BackendError, match="Backend cpu_torch failed in train_step: SystemExit: 0"):
        small_run(tmp_path / "run", {"training.max_steps": 1})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert NOTE in capsys.readouterr().err


CHATTY = """
import os
from dataclasses import replace
from qlora_hal_backends.cpu_torch import SPEC as CPU
print("an import")
SPEC = replace(CPU, name="NAME", priority=-1, trainer="chatty:open_trainer")
def open_trainer():
    from qlora_hal_backends.torch_family.platform import CPU
    from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer
    class Chatty(TorchLoRATrainer):
        def train_step(self, *window):
            print("a step")
            os.system("echo a child")
            return super().train_step(*window)
    return Chatty(SPEC, CPU)
"""


@pytest.mark.long
@pytest.mark.fault("E10")
def test_what_a_trainer_prints_is_no_part_of_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, {"chatty": ("chatty", CHATTY)})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    short = merged(SMALL, {"backend.name": "chatty", "training.max_steps": 1, "output_dir": str(tmp_path / "run")})
    (tmp_path / "run.json").write_text(json.dumps(short))
    command = [sys.executable, "-m", "qlora_hal.cli"]
    for arguments, fact in (
        (("train", str(tmp_path / "run.json")), ("backend", "chatty")),
        (("resume", str(tmp_path / "run")), ("steps", 1)),
        (("generate", "--run", str(tmp_path / "run"), "--prompt", "tail", "--max-new-tokens", "2"), ("prompt", "tail")),
    ):
        done = subprocess.run([*command, *arguments, "--json"], capture_output=True, text=True, check=True)
        assert fact in json.loads(done.stdout).items()
        assert arguments[0] == "resume" or "an import" in done.stderr
