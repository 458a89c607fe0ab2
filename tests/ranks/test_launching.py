"""`--devices` before any rank is started, and what is told when several of them fail."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import resume, train
from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.errors import BackendError, ConfigError, DataError, OutOfMemoryError, QloraHalError, StoppedError
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import answer_of, told_of
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.ranks import child, starting
from qlora_hal.ranks.launching import number_of, run_by_ranks

CPU: BackendSpec = load_spec(find("cpu_torch", listed()))
HERE = socket.gethostname()


def report(*devices: str, accelerated: bool) -> ProbeReport:
    return ProbeReport("cpu_torch", Availability.READY, "", devices=devices, uses_accelerator=accelerated)


# before a rank is started -------------------------------------------------------------------------------------------
def test_ranks_on_a_cpu_may_be_as_many_as_one_likes_and_auto_is_one() -> None:
    assert number_of(7, CPU, report("a CPU", accelerated=False)) == 7
    assert number_of("auto", CPU, report("a CPU", accelerated=False)) == 1


def test_auto_is_all_the_devices_that_are_there() -> None:
    assert number_of("auto", CPU, report("one", "two", accelerated=True)) == 2


@pytest.mark.fault("R01")
def test_more_devices_than_there_are_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="3 devices were asked for; cpu_torch sees 2 here: one, two") as caught:
        number_of(3, CPU, report("one", "two", accelerated=True))
    assert caught.value.code == "QH-R01"
    assert caught.value.fix == "Give --devices 2, or auto for all that are there."


@pytest.mark.fault("R06")
def test_a_backend_that_starts_no_ranks_is_refused_but_for_one() -> None:
    spec = replace(CPU, launcher="")
    assert number_of(1, spec, report("one", "two", accelerated=True)) == 1
    with pytest.raises(ConfigError, match="cannot train on 2 devices together") as caught:
        number_of(2, spec, report("one", "two", accelerated=True))
    assert caught.value.code == "QH-R06"


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return merged(SMALL, {"output_dir": str(folder / "run"), **changes})


@pytest.mark.fault("R01")
@pytest.mark.parametrize("devices", [0, -1, 5000, True, "all", "2.5", ""])
def test_what_is_no_number_of_devices_is_refused(devices: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a number from 1 to 4096 or 'auto' is expected") as caught:
        train(settings(tmp_path), devices=devices)
    assert caught.value.code == "QH-R01"
    with pytest.raises(ConfigError) as caught:
        resume(tmp_path / "run", devices=devices)
    assert caught.value.code == "QH-R01"
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("R01")
@pytest.mark.parametrize(("devices", "restarts"), [(2, -1), (2, True), (2, 1.5), (None, 2)])
def test_restarts_that_cannot_be_had_are_refused(devices: Any, restarts: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_restarts is") as caught:
        train(settings(tmp_path), devices=devices, max_restarts=restarts)
    assert caught.value.code == "QH-R01"
    with pytest.raises(ConfigError) as caught:
        resume(tmp_path, devices=devices, max_restarts=restarts)
    assert caught.value.code == "QH-R01"


@pytest.mark.fault("R01")
def test_devices_below_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--devices was given to rank 1 of 2") as caught:
        train(settings(tmp_path), devices=2)
    assert caught.value.code == "QH-R01"


@pytest.mark.fault("R06")
def test_observers_of_this_process_cannot_follow_ranks(tmp_path: Path) -> None:
    class Observer:
        pass

    with pytest.raises(ConfigError, match="1 observers are Python objects of this process") as caught:
        train(settings(tmp_path), devices=2, observers=[Observer()])
    assert caught.value.code == "QH-R06"


@pytest.mark.fault("R06")
def test_one_device_with_restarts_needs_a_launcher_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(starting, "run_by_ranks", lambda *given: seen.append(given[4]))
    train(settings(tmp_path), devices=1, max_restarts=2)
    assert seen == [1]
    there = report("a CPU", accelerated=False)
    monkeypatch.setattr(starting, "chosen_for_ranks", lambda *_, **more: (replace(CPU, launcher=""), there))
    with pytest.raises(ConfigError, match="nothing would start the run anew") as caught:
        train(settings(tmp_path), devices=1, max_restarts=2)
    assert caught.value.code == "QH-R06"


@pytest.mark.fault("R05")
def test_a_batch_that_does_not_divide_is_refused_before_a_rank_is_started(tmp_path: Path) -> None:
    changes = {"training.global_batch_size": 10, "training.gradient_accumulation_steps": 1}
    with pytest.raises(ConfigError, match="10 sequences a step cannot be dealt out to 2 devices") as caught:
        train(settings(tmp_path, **changes), devices=2)
    assert caught.value.code == "QH-R05"
    assert not (tmp_path / "run").exists()


# what is told when ranks fail ---------------------------------------------------------------------------------------
LAUNCHER = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[4])
for name, content in json.loads(os.environ["LEFT_BEHIND"]).items():
    (folder / name).write_text(json.dumps(content))
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have a launcher leave these answers of ranks, and this list of failures; what comes of it."""
    (tmp_path / "launcher_of_answers.py").write_text(LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    def run(answers: Mapping[int, object], failures: Sequence[tuple[int, str]] = (), status: int = 1) -> Any:
        files = {f"rank-{rank}.json": answer for rank, answer in answers.items()}
        monkeypatch.setenv("LEFT_BEHIND", json.dumps({**files, "failures.json": failures}, default=str))
        monkeypatch.setenv("STATUS", str(status))
        spec = replace(CPU, launcher="launcher_of_answers")
        try:
            return run_by_ranks("train", {}, tmp_path / "run", spec, 3, 0, None)
        except BaseException as error:
            return error

    return run


KILLED_LAUNCHER = """
import os, signal, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[4])
late = "import sys, time, pathlib; time.sleep(2); pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
rank = subprocess.Popen([sys.executable, "-c", late, str(folder / "rank-0.json"), os.environ["LEFT_BEHIND"]])
(folder / "rank-0.pid").write_text(str(rank.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault("R02")
def test_the_ranks_of_a_launcher_that_was_killed_are_waited_for_and_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked to stop, and hold the run's folder until they have saved."""
    (tmp_path / "killed_launcher.py").write_text(KILLED_LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    stopped = failed(StoppedError("QH-S19", "Stopped by SIGTERM after step 2; the state is saved.", fix="Resume."))
    monkeypatch.setenv("LEFT_BEHIND", json.dumps(stopped, default=str))
    began = time.monotonic()
    with pytest.raises(BackendError, match=r"The launcher of the ranks was ended by SIGKILL\.") as caught:
        run_by_ranks("train", {}, tmp_path / "run", replace(CPU, launcher="killed_launcher"), 1, 0, None)
    assert caught.value.code == "QH-R02"
    assert time.monotonic() - began >= 2


def test_a_rank_whose_starter_is_gone_with_its_folder_ends_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "request.json").write_text(json.dumps({"verb": "train", "request": {}, "console": {}}))

    def folder_gone(*given: object) -> None:
        shutil.rmtree(tmp_path / "ranks")

    monkeypatch.setattr(child, "carried_out", folder_gone)
    monkeypatch.setattr(child_process, "end_with_starter", lambda: None)
    assert child.main(tmp_path / "ranks") == 1


def failed(error: QloraHalError) -> dict[str, object]:
    return {"error": {**told_of(error), "exit_status": error.exit_status}}


LOST = failed(BackendError("QH-R02", "Rank 1 of 3 is gone or does not answer.", fix="Look.", context={"ranks": [1]}))
NO_ROOM = failed(OutOfMemoryError("QH-N07", "no room", where="a step", fix="Less."))
BAD_ROW = failed(DataError("QH-D05", "a bad row", fix="Mend it."))


@pytest.mark.fault("R02")
def test_a_rank_that_was_killed_is_the_cause_for_those_that_missed_it(left_behind: Any) -> None:
    error = left_behind({0: LOST, 2: LOST}, [(1, "SIGKILL"), (0, "exit status 1")])
    assert (error.code, error.context["rank"]) == ("QH-R02", 1)
    assert error.message == f"Rank 1 on {HERE} was ended by SIGKILL. No checkpoint was saved yet."
    assert error.fix == "Start the run again."


def test_a_rank_that_said_why_is_the_cause_with_its_name(left_behind: Any) -> None:
    error = left_behind({0: LOST, 1: NO_ROOM, 2: LOST}, [(0, "exit status 1"), (1, "exit status 1")])
    assert (type(error), error.code) == (OutOfMemoryError, "QH-N07")
    assert error.where == f"rank 1 on {HERE}: a step"


def test_of_several_that_said_why_the_one_that_failed_first_is_told(left_behind: Any) -> None:
    error = left_behind({1: NO_ROOM, 2: BAD_ROW}, [(2, "exit status 1"), (1, "exit status 1")])
    assert error.code == "QH-D05"
    error = left_behind({0: BAD_ROW, 1: BAD_ROW}, [])
    assert (error.code, error.where) == ("QH-D05", "")


@pytest.mark.fault("R02")
def test_a_rank_that_hung_is_told_as_that_although_it_had_to_be_killed(left_behind: Any) -> None:
    hung = failed(
        BackendError(
            "QH-R02",
            "Rank 1 of 3 is gone or does not answer. It was waited for 8 s.",
            where="rank 1 on elsewhere",
            fix="Look.",
            context={"ranks": [1], "waited_seconds": 8.0},
        )
    )
    error = left_behind({0: hung, 2: hung}, [(0, "exit status 1"), (1, "SIGKILL"), (2, "exit status 1")])
    assert error.message == (
        "Rank 1 of 3 is gone or does not answer. It was waited for 8 s. No checkpoint was saved yet."
    )
    assert error.where == "rank 1 on elsewhere"


def test_ranks_that_were_asked_to_stop_because_another_failed_are_not_the_cause(left_behind: Any) -> None:
    ended = {"ended": {"number": 15, "run_dir": None, "safe_step": None}}
    stop = failed(StoppedError("QH-S19", "Stopped by SIGTERM after step 3; the state is saved.", fix="Go on."))
    killed = left_behind({0: ended, 2: stop}, [(1, "SIGKILL")])
    assert (killed.code, killed.context["rank"]) == ("QH-R02", 1)
    assert left_behind({0: ended, 1: BAD_ROW}, [(0, "exit status 1"), (1, "exit status 1")]).code == "QH-D05"


def test_ranks_that_only_missed_one_another_are_told_as_the_first_says(left_behind: Any) -> None:
    error = left_behind({0: LOST, 1: LOST}, [(0, "exit status 1"), (1, "exit status 1")])
    assert error.message == "Rank 1 of 3 is gone or does not answer. No checkpoint was saved yet."


def test_a_launcher_that_left_nothing_is_told_with_its_end(left_behind: Any) -> None:
    error = left_behind({}, [], status=9)
    assert error.code == "QH-R02"
    assert error.message.startswith("The launcher of the ranks was ended by exit status 9")


def test_a_defect_on_a_rank_is_told_as_one_with_its_traceback(left_behind: Any) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("nothing")

    error = left_behind({0: LOST, 1: answer_of(broken)}, [(1, "exit status 1")])
    assert isinstance(error, RuntimeError)
    assert str(error) == "in rank 1: ZeroDivisionError: nothing"
    assert "Traceback" in error.__notes__[0]


def test_a_stop_that_all_were_asked_for_is_that_of_the_first(left_behind: Any) -> None:
    stop = failed(StoppedError("QH-S19", "Stopped by SIGTERM after step 3; the state is saved.", fix="Go on."))
    error = left_behind({0: stop, 1: stop, 2: stop}, [], status=0)
    assert isinstance(error, StoppedError)
    ended = {"ended": {"number": 15, "run_dir": None, "safe_step": None}}
    assert isinstance(left_behind({0: ended}, [], status=0), EndedAtOnce)
