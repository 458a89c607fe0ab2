"""K steps, a stop, M steps: the same bits as K + M steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, resume, train
from qlora_hal.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("usual_signals")]

Trained = Callable[..., TrainResult]

SETTINGS = {
    "lora.dropout": 0.2,
    "training.max_steps": 8,
    "training.weight_decay": 0.1,
    "training.lr_scheduler_type": "cosine",
    "checkpoint.save_steps": 3,
}


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def killed_run(folder: Path, faults: str, extra: dict[str, object]) -> int:
    """Train in a child that a fault point kills; returns its exit status."""
    config = merged(SMALL, {**SETTINGS, **extra, "output_dir": str(folder)})
    program = f"import json\nfrom qlora_hal import train\ntrain(json.loads({json.dumps(config)!r}))"
    environment = {**os.environ, "QLORA_HAL_FAULTS": faults}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False).returncode


@pytest.mark.fault("S01", "S05", "N22")
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.long)])
def test_run_killed_during_a_save_goes_on_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    extra = {"training.optim": optimizer}
    whole = train(merged(SMALL, {**SETTINGS, **extra, "output_dir": str(tmp_path / "whole")}))
    status = killed_run(tmp_path / "broken", "ckpt.after_optimizer_write:kill@2", extra)
    assert status == -signal.SIGKILL
    resumed = resume(tmp_path / "broken")
    assert resumed.steps == 8
    assert [step for step, _ in resumed.losses] == [4, 5, 6, 7, 8]
    assert dict(resumed.losses).items() <= dict(whole.losses).items()
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")
    steps = [json.loads(line).get("step") for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.long)])
def test_epsilon_measured_in_the_first_step_outlives_a_kill(optimizer: str, tmp_path: Path) -> None:
    extra = {
        "training.optim": optimizer,
        "training.adam_epsilon_from_noise": True,
        "training.adam_epsilon": 1e-12,  # float32's rounding error is more
        "training.max_steps": 4,
        "checkpoint.save_steps": 2,
    }
    whole = train(merged(SMALL, {**SETTINGS, **extra, "output_dir": str(tmp_path / "whole")}))
    assert killed_run(tmp_path / "broken", "ckpt.after_rename:kill@1", extra) == -signal.SIGKILL
    resumed = resume(tmp_path / "broken")
    assert dict(resumed.losses) == dict(whole.losses[2:])
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")
    notes = json.loads((tmp_path / "broken" / "run.json").read_text())["notes"]
    assert [note for note in notes if note.startswith("adam_epsilon is ")] == [
        note for note in whole.notes if note.startswith("adam_epsilon is ")
    ]


@pytest.mark.fault("S19", "S21")
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    asked = {"training.max_steps": 400, "training.sample_prompts": ["What does ls do?"]}
    config = merged(SMALL, {**SETTINGS, **asked, "output_dir": str(tmp_path / "run")})
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora_hal.cli", "train", str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CI": "1"},
    )
    said = []
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            said.append(line)
            if line.startswith("step 2/"):
                child.send_signal(signal.SIGTERM)
                break
        said.append(child.stderr.read())
    assert child.returncode == 75, "".join(said)
    assert "qlora-hal resume" in "".join(said)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert len(saved) >= 1
    assert "the run was stopped before" in (tmp_path / "run" / "report.html").read_text()


def test_finished_run_resumed_changes_nothing(trained: Trained) -> None:
    result = trained(training__max_steps=3)
    before = adapter_bytes(result.run_dir)
    again = resume(result.run_dir)
    assert again.steps == 3
    assert adapter_bytes(result.run_dir) == before


@pytest.mark.fault("D16")
def test_changed_data_refuse_an_exact_resume(tmp_path: Path) -> None:
    from qlora_hal.demo import data_path

    rows = data_path("train").read_text().splitlines(keepends=True)[:60]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows))
    assert killed_run(tmp_path / "run", "ckpt.after_rename:kill@1", {"data.path": str(file)}) == -signal.SIGKILL
    file.write_text("".join(rows[1:]))
    with pytest.raises(CheckpointError) as refusal:
        resume(tmp_path / "run")
    assert refusal.value.code == "QH-D16"
    assert "data_fingerprint" in refusal.value.message


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    from qlora_hal.errors import QloraHalError

    with pytest.raises(QloraHalError, match=r"run\.json"):
        resume(tmp_path)
