"""A run in a child process: the same result, the same errors, and a named end where the system ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import SMALL, merged, small_run

from qlora_hal import resume, train
from qlora_hal.contract.backend import BackendSpec
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.errors import ConfigError, ModelError, OutOfMemoryError
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.report.console import RunConsole
from qlora_hal.run.supervisor import SUPERVISED_VARIABLE, is_supervised

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("usual_signals")]


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu_torch, asking for supervision as mlx_lora does on a Mac."""
    entry = find("cpu_torch", listed())
    spec: BackendSpec = replace(load_spec(entry), supervised=True)
    monkeypatch.setattr(discovery, "listed", lambda *more: (replace(entry, spec=spec),))
    monkeypatch.delenv(SUPERVISED_VARIABLE, raising=False)


def settings(folder: Path, **changes: object) -> dict[str, object]:
    return merged(SMALL, {"output_dir": str(folder), **changes})


def test_only_a_backend_that_asks_for_it_is_supervised(supervised: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_supervised("cpu_torch", ())
    assert is_supervised("auto", ())
    assert not is_supervised("another", ())
    assert not is_supervised("cpu_torch", (object(),))  # an observer cannot follow
    monkeypatch.setenv(SUPERVISED_VARIABLE, "1")
    assert not is_supervised("cpu_torch", ())


@pytest.mark.long
def test_a_supervised_run_gives_what_a_run_in_this_process_gives(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    alone = small_run(tmp_path / "alone", {"training.max_steps": 3})
    request.getfixturevalue("supervised")
    apart = train(settings(tmp_path / "apart", **{"training.max_steps": 3}), console=RunConsole(quiet=True))
    assert apart.losses == alone.losses
    assert type(apart) is type(alone)
    assert (tmp_path / "apart" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "alone" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert {"run_dir": apart.run_dir.name, "steps": apart.steps} == {"run_dir": "apart", "steps": 3}


def test_an_error_of_the_child_comes_out_as_it_was(supervised: None, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    with pytest.raises(ModelError, match="has no config") as caught:
        train(settings(tmp_path / "run", **{"model.name_or_path": str(broken)}))
    assert (caught.value.code, caught.value.exit_status) == ("QH-C70", 5)
    with pytest.raises(ConfigError):
        train(settings(tmp_path / "run", **{"training.max_steps": -1}))


@pytest.mark.long
def test_a_defect_in_the_child_is_told_as_one(
    supervised: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as memory that ran out; its traceback comes along."""
    monkeypatch.setenv("QLORA_HAL_FAULTS", "ckpt.before_first_write:raise@1")
    with pytest.raises(RuntimeError, match="in the training process: InjectedFault") as caught:
        train(settings(tmp_path / "run", **{"training.max_steps": 1}), console=RunConsole(quiet=True))
    assert "Traceback" in caught.value.__notes__[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_began_ends_the_child_as_asked(
    supervised: None, tmp_path: Path, number: signal.Signals
) -> None:
    asker = threading.Thread(target=ask_when_it_is_handed_on, args=(number, signal.getsignal(number)))
    asker.start()
    # By where it was met: before or after the run had its folder.
    with pytest.raises(EndedAtOnce, match=r"what was in progress is not done|no step was saved yet") as caught:
        train(settings(tmp_path / "run", **{"training.max_steps": 500}), console=RunConsole(quiet=True))
    asker.join()
    assert caught.value.exit_status == 128 + number


SUPERVISING = """
import json, sys
from dataclasses import replace
from qlora_hal import train
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import find, listed, load_spec
entry = find("cpu_torch", listed())
discovery.listed = lambda *more: (replace(entry, spec=replace(load_spec(entry), supervised=True)),)
train(json.loads(sys.argv[1]))
"""


@pytest.mark.fault("S24")
def test_a_run_whose_supervisor_is_gone_saves_its_state_and_stops(tmp_path: Path) -> None:
    """Nobody is left to hand signals on, or to hear of the end: an orphan would hold the folder for as long as it
    trains."""
    run = tmp_path / "run"
    changes = {"training.max_steps": 5000, "checkpoint.save_steps": 1, "training.gradient_accumulation_steps": 1}
    environment = {name: value for name, value in os.environ.items() if name != SUPERVISED_VARIABLE}
    command = [sys.executable, "-c", SUPERVISING, json.dumps(settings(run, **changes))]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not (run / "checkpoints" / "step-00000001").is_dir():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGUSR1)  # handed on: neither of the two dies of it
    time.sleep(0.1)
    assert parent.poll() is None
    parent.kill()
    parent.communicate()
    while (run / "run.lock.json").exists():  # the child gives the folder free when it has stopped
        time.sleep(0.05)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["stopped_because"]) == ("stopped", "SIGTERM")
    assert any("SIGUSR1: saving after this step" in note for note in record["notes"])


@pytest.mark.fault("S24")
def test_a_run_that_the_driver_aborts_is_named_and_goes_on(supervised: None, tmp_path: Path) -> None:
    """A child that dies by SIGABRT in mid-training, as Metal ends it; then the same command goes on."""
    run = tmp_path / "run"
    changes = {"training.max_steps": 16, "checkpoint.save_steps": 2}
    killer = threading.Thread(target=abort_after_a_checkpoint, args=(run,), daemon=True)
    killer.start()
    with pytest.raises(OutOfMemoryError, match="ended by SIGABRT") as caught:
        train(settings(run, **changes), console=RunConsole(quiet=True))
    killer.join()
    assert (caught.value.code, caught.value.exit_status) == ("QH-S24", 7)
    assert "memory" in caught.value.cause
    assert caught.value.fix == f"Resume with: qlora-hal resume {run}"
    result = resume(run, console=RunConsole(quiet=True))
    assert (result.steps, result.stopped_because) == (16, "finished")


def ask_when_it_is_handed_on(number: signal.Signals, before: object) -> None:
    """Sent any earlier, the signal would end the tests."""
    while signal.getsignal(number) == before:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), number)


def abort_after_a_checkpoint(run: Path) -> None:
    while not (run / "checkpoints" / "step-00000002").is_dir():
        time.sleep(0.05)
    os.kill(json.loads((run / "run.lock.json").read_text())["pid"], signal.SIGABRT)


@pytest.mark.fault("S24")
def test_without_a_checkpoint_the_way_out_is_a_smaller_run(supervised: None, tmp_path: Path) -> None:
    from qlora_hal.run.supervisor import _ended

    error = _ended(-signal.SIGKILL, tmp_path)
    assert "per_device_train_batch_size" in error.fix
    assert "memory runs out" in error.cause


def test_what_a_backend_prepares_is_there_when_its_trainer_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some libraries read their variables once, at import."""
    spec = load_spec(find("cpu_torch", listed()))
    module, _, attribute = spec.trainer.partition(":")
    (tmp_path / "reads_at_import.py").write_text(
        f"import os\nPIECES = os.environ['QLORA_HAL_TEST_PIECES']\nfrom {module} import {attribute}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QLORA_HAL_TEST_PIECES", "not prepared")

    def prepare(options: Mapping[str, object]) -> None:
        os.environ["QLORA_HAL_TEST_PIECES"] = str(options["pieces"])

    spec = replace(
        spec,
        trainer=f"reads_at_import:{attribute}",
        option_choices={"pieces": ("small", "large")},
        prepare_process=prepare,
    )
    discovery.open_trainer(spec, {"pieces": "large"}).close()
    assert sys.modules["reads_at_import"].PIECES == "large"
