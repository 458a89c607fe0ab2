"""`--devices N`: the ranks of one run, started by the backend's launcher (torchrun's agent, or MLX's) and waited for.

The launcher is a process of its own, in a session of its own, which starts a `ranks.child` for each device. Each child
leaves its answer in a file; what people read goes to the terminal from rank 0 alone. What went wrong is told once, by
the rank it went wrong on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.contract.capabilities import Requirements
from qlora_hal.detect import discovery
from qlora_hal.detect.selection import choose
from qlora_hal.errors import BackendError, ConfigError, QloraHalError
from qlora_hal.errors.way_on import resume_line
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import defect_from, ended_from, error_from
from qlora_hal.processes.signals import EndedAtOnce, handing_on
from qlora_hal.ranks.planning import not_on_several
from qlora_hal.report.metrics import last_step
from qlora_hal.run.directory import METRICS_FILE
from qlora_hal.run.finish import ended_in
from qlora_hal.run.result import TrainResult

if TYPE_CHECKING:
    from qlora_hal.contract.backend import BackendSpec, ProbeReport
    from qlora_hal.report.console import RunConsole

AUTO = "auto"
REQUEST_FILE, FAILURES_FILE = "request.json", "failures.json"
PROCESS_FILE = "rank-0.pid"
"""Written by rank 0 while it can hear a request to save."""
SECONDS_TO_SAVE = 600
"""How long ranks have that were asked to stop, as launchers give it to them."""
CHILD = "qlora_hal.ranks.child"
LOST, STOPPED = "QH-R02", "QH-S19"
"""What a rank says when another one is gone, and when it was asked to stop: never the cause."""


def number_of(devices: int | str, spec: BackendSpec, report: ProbeReport) -> int:
    """How many ranks to start. Raises ConfigError QH-R01 for more than there are, UnsupportedFeatureError QH-R06 for a
    backend that starts none."""
    there = len(report.devices) if has_own_devices(spec, report) else 0
    wanted = (there or 1) if devices == AUTO else int(devices)
    if wanted > 1 and not spec.launcher:
        raise not_on_several(spec.name, wanted)
    if wanted > there > 0:
        raise ConfigError(
            "QH-R01",
            f"{wanted} devices were asked for; {spec.name} sees {there} here: {', '.join(report.devices)}.",
            where="--devices",
            fix=f"Give --devices {there}, or auto for all that are there.",
        )
    return wanted


def has_own_devices(spec: BackendSpec, report: ProbeReport) -> bool:
    """Whether devices are counted: ranks on a CPU share its cores, and may be as many as one likes."""
    return spec.uses_accelerator if report.uses_accelerator is None else report.uses_accelerator


def run_by_ranks(
    verb: str,
    request: Mapping[str, object],
    run_dir: Path,
    spec: BackendSpec,
    ranks: int,
    max_restarts: int,
    console: RunConsole | None,
) -> TrainResult:
    """Carry out `train` or `resume` by so many ranks of this machine. Raises what the rank that failed first raised,
    naming it; BackendError QH-R02 for one that was ended from outside; EndedAtOnce for a signal that was handed on."""
    shown = console.manner if console is not None else {}
    with tempfile.TemporaryDirectory(prefix="qlora-hal-ranks-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        text = json.dumps({"verb": verb, "request": request, "console": shown})
        (folder / REQUEST_FILE).write_text(text, encoding="utf-8")
        command = child_process.module_command(spec.launcher, str(ranks), str(max_restarts), CHILD, str(folder))
        child = child_process.start(command, start_new_session=True)
        try:
            with handing_on(lambda number: _hand_on(number, child, folder)) as handed:
                child.wait()
        finally:
            child_process.ended(child)
        if child.returncode < 0:
            _wait_for_the_first(folder)
        answers = read_answers(folder, ranks)
        failures = _failures(folder)
    if answers.get(0, {}).get("result") is not None and not failures:
        return TrainResult.from_json(answers[0]["result"])
    if handed - {getattr(signal, "SIGUSR1", None)} and not any("error" in answer for answer in answers.values()):
        raise ended_in(run_dir, EndedAtOnce(next(iter(handed)), again=False))
    if child.returncode < 0 and not handed and all(map(_follows, answers.values())):
        raise _killed(None, signal.Signals(-child.returncode).name, run_dir)
    raise _what_went_wrong(answers, failures, child.returncode, run_dir)


def _wait_for_the_first(folder: Path) -> None:
    """For rank 0 of a launcher that was killed: it is asked to stop, and holds the run's folder until it has saved."""
    with suppress(OSError, ValueError):  # it never began, or is gone
        process, until = int((folder / PROCESS_FILE).read_text(encoding="utf-8")), time.monotonic() + SECONDS_TO_SAVE
        while not (folder / answer_file(0)).is_file() and time.monotonic() < until:
            os.kill(process, 0)
            time.sleep(0.1)


def answer_file(rank: int) -> str:
    return f"rank-{rank}.json"


def _hand_on(number: int, launcher: subprocess.Popen[Any], folder: Path) -> None:
    """A request to stop goes to the launcher, which asks all ranks; one to save to rank 0 alone, which asks the others
    itself: launchers know nothing of it."""
    if number != getattr(signal, "SIGUSR1", None):
        launcher.send_signal(number)
        return
    with suppress(OSError, ValueError):  # before there is anything to save, or after
        os.kill(int((folder / PROCESS_FILE).read_text(encoding="utf-8")), number)


def read_answers(folder: Path, ranks: int) -> dict[int, dict[str, Any]]:
    """What each rank left; a rank that was ended from outside left nothing."""
    found = {}
    for rank in range(ranks):
        file = folder / answer_file(rank)
        if file.is_file():
            found[rank] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _failures(folder: Path) -> dict[int, str]:
    """How the ranks ended that the launcher saw fail, the first one first."""
    file = folder / FAILURES_FILE
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return {int(rank): str(how) for rank, how in told}


def _what_went_wrong(
    answers: Mapping[int, Mapping[str, Any]], failures: Mapping[int, str], status: int, run_dir: Path
) -> BaseException:
    """The cause, not what followed from it: a rank that said why, then one that was killed, and both before those that
    only missed another or were asked to stop because of it. One that hung was killed because of that."""
    told = {rank: answer for rank, answer in answers.items() if "result" not in answer}
    causes = {rank: answer for rank, answer in told.items() if not _follows(answer)}
    missed = {rank: answer["error"]["context"] for rank, answer in told.items() if _code_of(answer) == LOST}
    waited_for = {rank for context in missed.values() if "waited_seconds" in context for rank in context["ranks"]}
    silent = [rank for rank in failures if rank not in answers and rank not in waited_for]
    if causes:
        rank = min(causes, key=lambda each: (list(failures).index(each) if each in failures else len(failures), each))
        return _told_by(rank, causes[rank], run_dir)
    if silent:
        return _killed(silent[0], failures[silent[0]], run_dir)
    if told:
        rank = min(missed or told)
        return _told_by(rank, told[rank], run_dir)
    return _killed(None, f"exit status {status}", run_dir)


def _follows(answer: Mapping[str, Any]) -> bool:
    """Whether this is how a rank ends of which another one is gone, or that was asked to stop."""
    return "ended" in answer or _code_of(answer) in (LOST, STOPPED)


def _code_of(answer: Mapping[str, Any]) -> str:
    return str(answer.get("error", {}).get("code", ""))


def _told_by(rank: int, answer: Mapping[str, Any], run_dir: Path) -> BaseException:
    if "ended" in answer:
        return ended_in(run_dir, ended_from(answer["ended"]))
    if "error" not in answer:
        return defect_from(answer["defect"], f"rank {rank}")
    error = error_from(answer["error"])
    if error.code == LOST:
        error.message += f" {_stands(run_dir)}"
        error.fix = _way_on(run_dir)
    elif rank:  # rank 0 is the run; another one has to say which it is
        error.where = f"rank {rank} on {socket.gethostname()}" + (f": {error.where}" if error.where else "")
    return error


def _killed(rank: int | None, how: str, run_dir: Path) -> QloraHalError:
    who = "The launcher of the ranks" if rank is None else f"Rank {rank} on {socket.gethostname()}"
    return BackendError(
        LOST,
        f"{who} was ended by {how}{_last_step(run_dir)}. {_stands(run_dir)}",
        where=str(run_dir),
        cause="The system ends the largest process when memory runs out; a scheduler or a person may have ended it.",
        fix=_way_on(run_dir),
        context={"rank": rank, "ended_by": how, "checkpoint": _saved(run_dir)},
    )


def _saved(run_dir: Path) -> int | None:
    return max((step for step, _ in checkpoints(run_dir)), default=None)


def _stands(run_dir: Path) -> str:
    saved = _saved(run_dir)
    return f"The checkpoint of step {saved} stands." if saved is not None else "No checkpoint was saved yet."


def _way_on(run_dir: Path) -> str:
    return f"Resume with: {resume_line(run_dir)}" if _saved(run_dir) is not None else "Start the run again."


def _last_step(run_dir: Path) -> str:
    """Where the run was, by the last whole line of its log."""
    step = last_step(run_dir / METRICS_FILE)
    return "" if step is None else f" after step {step}"


def chosen_for_ranks(name: str, *, allow_cpu: bool) -> tuple[BackendSpec, ProbeReport]:
    """The backend that will run, before any model is looked at: the one named, or the ready one of highest priority.

    Raises what `selection.choose` raises.
    """
    entries = discovery.listed()
    probed = discovery.reports(entries)
    spec = choose(name, Requirements(), entries, probed, allow_cpu=allow_cpu).spec
    return spec, next(report for report in probed if report.backend == spec.name)
