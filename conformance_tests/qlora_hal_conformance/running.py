"""The parent's side of a run: children that may crash, hang or exit, and a journal that is complete all the same.

The backend is never imported here. A child that dies is replaced by one that goes on after the case that killed it.
Cases may run in several lanes side by side: each has children, a folder and a journal of its own, and the parent writes
what it hears from them into the journal of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from qlora_hal_conformance.catalogue import SECTIONS_FOLDER
from qlora_hal_conformance.journal import Journal, result_as_json
from qlora_hal_conformance.patience import Patience
from qlora_hal_conformance.request import REQUEST_VARIABLE, Request
from qlora_hal_conformance.verdicts import CaseResult, Verdict

MOST_RESTARTS = 12
"""A backend that dies in more cases than this is judged by what it did so far; the rest is inconclusive."""
OPENING_SECONDS = 240.0
"""Time for collection and the first heavy import, before any case has started."""
POLL_SECONDS = 0.02
MOST_LANES = 4
"""A lane loads the backend's libraries once more, 1 to 2 GB; beyond four the longest cases decide how long it takes."""

_OVER = object()

Progress = Callable[[Mapping[str, object]], None]
CHILD_LOG = "child.log"


@dataclass(frozen=True, slots=True)
class Ending:
    """How one child ended: `stuck` is the case it was in, `how` says what happened to the process."""

    finished: bool
    stuck: str = ""
    how: str = ""


def run_cases(
    request: Request, progress: Progress, *, sections: tuple[Path, ...] = (SECTIONS_FOLDER,), lanes: int = 1
) -> None:
    """Run every case that the request lets through; whatever the backend does, the journal says it."""
    journal = Journal(request.journal_path)

    def heard(event: Mapping[str, object]) -> None:
        journal.write(**event)  # type: ignore[arg-type]
        progress(event)

    with contextlib.ExitStack() as stack:
        running = [_lane(_in_lane(request, number, lanes), heard, sections) for number in range(lanes)]
        for lane in running:
            stack.callback(lane.close)
        while running := [lane for lane in running if _goes_on(lane)]:
            time.sleep(POLL_SECONDS)


def lanes_here() -> int:
    """As many lanes as there are processors for, up to `MOST_LANES`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_LANES, usable or 1)


def said_by_children(request: Request) -> str:
    """What all children of a run wrote to their output, lane by lane."""
    logs = sorted(Path(request.folder).glob(f"lane-*/{CHILD_LOG}"))
    return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)


def _in_lane(request: Request, number: int, lanes: int) -> Request:
    folder = Path(request.folder) / f"lane-{number}"
    folder.mkdir(exist_ok=True)
    return replace(request, folder=str(folder), lane=number, lanes=lanes)


def _goes_on(lane: Generator[None, None, None]) -> bool:
    return next(lane, _OVER) is not _OVER


def _lane(request: Request, heard: Progress, sections: tuple[Path, ...]) -> Generator[None, None, None]:
    """One child after the other until the lane's cases are done; yields whenever it waits."""
    journal = Journal(request.journal_path)
    for _ in range(MOST_RESTARTS + 1):
        left = replace(request, done=_done(journal))
        ending = yield from _one_child(left, heard, sections)
        if ending.finished:
            return
        if not ending.stuck:
            # It died outside of any case: at import, at collection, or between two. Another child would do the same.
            heard({"event": "broke_off", "how": ending.how})
            return
        died = {"event": "ended", **result_as_json(CaseResult(ending.stuck, Verdict.FAILED, ending.how))}
        journal.write(**died)  # type: ignore[arg-type]
        heard(died)
    heard({"event": "broke_off", "how": f"more than {MOST_RESTARTS} cases ended the process"})


def _done(journal: Journal) -> tuple[str, ...]:
    return tuple(str(event["case"]) for event in journal.read() if event["event"] == "ended")


def _one_child(request: Request, heard: Progress, sections: tuple[Path, ...]) -> Generator[None, None, Ending]:
    folder, journal = Path(request.folder), request.journal_path
    request.write(folder / "request.json")
    journal.touch()
    with open(folder / CHILD_LOG, "ab") as log, open(journal, "rb") as events:
        events.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            _command(request, folder, sections),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_environment(request, folder),
            start_new_session=True,
        )
        try:
            return (yield from _watched(child, events, request, heard))
        finally:
            _kill(child)


def _watched(
    child: subprocess.Popen[bytes], events: BinaryIO, request: Request, heard: Progress
) -> Generator[None, None, Ending]:
    """Follow the journal until the child ends, or a case makes no progress for as long as its time."""
    running, patience, finished = "", Patience(child.pid), False
    partial = b""
    while True:
        ended = child.poll() is not None
        partial += events.read()
        *lines, partial = partial.split(b"\n")
        for line in filter(None, lines):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                patience.restart()
                if event["event"] == "started":
                    running = str(event["case"])
                elif event["event"] == "ended":
                    running = ""
                finished = finished or event["event"] == "finished"
                heard(event)
        if ended:
            return Ending(finished and not running, running, f"crashed: the process {_how(child.returncode)}")
        limit = request.timeout_seconds if running else max(OPENING_SECONDS, request.timeout_seconds)
        if patience.is_over(limit):
            what = f"hung: no answer within {limit:g} s" + ("" if running else " before the first case")
            return Ending(False, running, what)
        yield


def _how(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started in its group, which outlives a child that crashed."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def _command(request: Request, folder: Path, sections: tuple[Path, ...]) -> list[str]:
    """pytest with a configuration of its own: no ini file, conftest or plugin of the user takes part."""
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\nxfail_strict = true\naddopts = --strict-markers\n", encoding="utf-8")
    root = sections[0] if sections[0].is_dir() else sections[0].parent
    command = [sys.executable, "-m", "pytest", "-c", str(empty), "--rootdir", str(root), "--noconftest"]
    command += ["-p", "qlora_hal_conformance.plugin", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=short"]
    command += [f"--basetemp={folder / f'pytest-{time.monotonic_ns()}'}", "-q"]
    if request.keyword and not request.extra:
        command += ["-k", request.keyword]
    if request.collect_only:
        command += ["--collect-only"]
    return command + [str(path) for path in sections]


def _environment(request: Request, folder: Path) -> dict[str, str]:
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")}
    environment |= {
        REQUEST_VARIABLE: str(folder / "request.json"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The oracle's products are too small for a second thread. The backend's own threads (OMP) are left as they are.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    # On a busy machine, threads that wait by spinning turn a product of milliseconds into seconds.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The child works in another folder, so what was relative to this one is made absolute.
    paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not request.reference.is_listed:
        paths.insert(0, os.getcwd())  # a plugin under development lies where its author runs the suite
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
