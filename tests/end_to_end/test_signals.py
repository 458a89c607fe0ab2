"""Signals to the real command line: what is ignored stays ignored, a second one ends at once and says what is safe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import SMALL, merged

from qlora_hal.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("usual_signals")

CHANGES = {"training.max_steps": 400, "checkpoint.save_steps": 1, "training.gradient_accumulation_steps": 1}


@contextmanager
def training(
    folder: Path, *arguments: str, ignored: signal.Signals | None = None, **changes: object
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`qlora-hal train` up to its second step, with the lines that it has said."""
    config = merged(SMALL, {**CHANGES, **changes, "output_dir": str(folder / "run")})
    (folder / "run.json").write_text(json.dumps(config))
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora_hal.cli", "train", str(folder / "run.json"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CI": "1"},
        preexec_fn=None if ignored is None else ignoring(ignored),
    )
    said: list[str] = []
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            said.append(line)
            if line.startswith("step 2/"):
                break
        yield child, said


def ignoring(number: signal.Signals) -> Callable[[], None]:
    """What nohup does before it becomes the command."""
    return lambda: signal.signal(number, signal.SIG_IGN) and None


@pytest.mark.fault("S22")
@pytest.mark.long
def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(tmp_path: Path) -> None:
    changes = {"training.max_steps": 6}
    with training(tmp_path, ignored=signal.SIGHUP, **changes) as (child, said):
        child.send_signal(signal.SIGHUP)
        assert child.stderr is not None
        said.append(child.stderr.read())
    assert child.returncode == 0, "".join(said)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.long
@pytest.mark.fault("S22")
def test_a_closed_terminal_stops_the_run_with_its_state_saved(tmp_path: Path) -> None:
    with training(tmp_path, **{"training.max_steps": 200}) as (child, said):
        child.send_signal(signal.SIGHUP)
        assert child.stderr is not None
        said.append(child.stderr.read())
    assert child.returncode == 75, "".join(said)
    assert "qlora-hal resume" in said[-1]


@pytest.mark.fault("S22")
@pytest.mark.long
def test_a_scheduler_that_warns_gets_a_save_and_the_run_goes_on(tmp_path: Path) -> None:
    with training(tmp_path, **{"training.max_steps": 30, "checkpoint.save_steps": 1000}) as (child, said):
        child.send_signal(signal.SIGUSR1)
        assert child.stderr is not None
        said.append(child.stderr.read())
    assert child.returncode == 0, "".join(said)
    assert "SIGUSR1: saving after this step, then continuing." in said[-1]
    steps = [step for step, _ in checkpoints(tmp_path / "run")]
    assert len(steps) == 2
    assert 2 <= steps[0] < 30 == steps[1]


@pytest.mark.fault("S21")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_the_second_signal_ends_at_once_with_its_own_status_and_names_what_is_safe(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    # A whole window of many rows: the second signal comes in the middle of a step.
    changes = {"training.gradient_accumulation_steps": 20, "training.per_device_train_batch_size": 8}
    with training(tmp_path, **changes) as (child, said):
        child.send_signal(number)
        time.sleep(0.2)
        child.send_signal(number)
        assert child.stderr is not None
        said.append(child.stderr.read())
    assert child.returncode == status, "".join(said)
    assert f"ended immediately by {number.name}; step " in "".join(said)
    assert f"is safe on disk. Resume with: qlora-hal resume {tmp_path / 'run'}" in "".join(said)
    assert "Traceback" not in "".join(said)


@pytest.mark.long
def test_an_early_end_is_told_as_json_too(tmp_path: Path) -> None:
    changes = {"training.gradient_accumulation_steps": 20, "training.per_device_train_batch_size": 8}
    with training(tmp_path, "--json", **changes) as (child, _):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate()
    told = json.loads(out.splitlines()[-1])
    assert (told["code"], told["exit_status"]) == ("QH-S21", 143)
    assert told["run_dir"] == str(tmp_path / "run")
    assert told["step"] >= 1


@pytest.mark.long
def test_a_supervised_run_tells_the_same_through_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_hal import train
    from qlora_hal.detect import discovery
    from qlora_hal.detect.discovery import find, listed, load_spec
    from qlora_hal.processes.signals import EndedAtOnce
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.supervisor import SUPERVISED_VARIABLE

    entry = find("cpu_torch", listed())
    supervised = replace(entry, spec=replace(load_spec(entry), supervised=True))
    monkeypatch.setattr(discovery, "listed", lambda *more: (supervised,))
    monkeypatch.delenv(SUPERVISED_VARIABLE, raising=False)
    run = tmp_path / "run"
    sender = threading.Thread(target=signal_twice_after_a_checkpoint, args=(run,), daemon=True)
    sender.start()
    changes = {"training.gradient_accumulation_steps": 20, "training.per_device_train_batch_size": 8}
    with pytest.raises(EndedAtOnce) as caught:
        train(merged(SMALL, {**CHANGES, **changes, "output_dir": str(run)}), console=RunConsole(quiet=True))
    sender.join()
    assert (caught.value.exit_status, caught.value.run_dir) == (143, run)
    assert caught.value.safe_step is not None


def signal_twice_after_a_checkpoint(run: Path) -> None:
    while not (run / "checkpoints" / "step-00000001").is_dir():
        time.sleep(0.05)
    owner = json.loads((run / "run.lock.json").read_text())["pid"]
    os.kill(owner, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(owner, signal.SIGTERM)
