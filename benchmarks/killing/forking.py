"""The command line in a forked copy of this process, which has imported all that a run imports.

A fork takes milliseconds where an interpreter with a tensor library takes many seconds. It is safe while this process
has one thread and has computed nothing: no pool, no lock and no autograd thread can be left behind in the copy. What
starts threads when it is imported is left to each copy.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killing.triggers import Kill, arm

LIMIT_SECONDS = 300.0
_STATUS_OF_A_CRASH = 99
_WITH_THREADS = ("gptqmodel", "logbar", "defuser", "device_smi", "tokenicer", "pcre", "datasets", "pandas", "pyarrow")
"""gptqmodel and what comes with it: a pool of workers, a logger that draws from two threads, Arrow's allocator."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` as the shell sees it (137 for SIGKILL), None when it hung and was killed for it.
    `calls` are those of each phase, of a command that was not killed by its phase."""

    status: int | None
    seconds: float
    said: str
    calls: dict[str, int] = field(default_factory=dict)


def in_fork(arguments: Sequence[str], folder: Path, kill: Kill | None = None, *, teach: Path | None = None) -> Ended:
    """Run `qlora-hal arguments` in a fork, with `kill` on its way. `teach` is where it writes which modules it has
    imported in the end."""
    _require_one_thread()
    told = folder / "said.txt"
    counted = folder / "calls.json"
    counted.unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, told, counted, kill, teach)
    status = _waited(child, started, kill)
    calls = json.loads(counted.read_text()) if counted.exists() else {}
    return Ended(status, time.monotonic() - started, told.read_text(errors="replace"), calls)


def import_taught(names: Path) -> None:
    """Import what a run imported, so that no later fork has to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in json.loads(names.read_text()):
            if name not in sys.modules and not name.startswith(("__", "killing", *_WITH_THREADS)):
                try:
                    importlib.import_module(name)
                except (Exception, SystemExit):  # some modules can only be imported in their own order
                    continue
    gc.collect()
    gc.freeze()  # a fork that collects its garbage would copy every page of what was imported


def _be_the_command(arguments: Sequence[str], told: Path, counted: Path, kill: Kill | None, teach: Path | None) -> None:
    """Never returns."""
    status = _STATUS_OF_A_CRASH
    try:
        _streams_into(told)
        _usual_signals()
        from qlora_hal.checkpoint.faults import forget_passes
        from qlora_hal.cli.__main__ import main

        forget_passes()
        counter = arm(kill)
        try:
            status = main(list(arguments))
        finally:
            sys.setprofile(None)
        if counter is not None:
            counted.write_text(json.dumps(counter.calls))
        if teach is not None:
            teach.write_text(json.dumps(sorted(sys.modules)))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _streams_into(told: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace", buffering=1)


def _usual_signals() -> None:
    """As a shell starts a command in the foreground, however this process was started itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(signal.Signals[name], signal.SIG_DFL)


def _waited(child: int, started: float, kill: Kill | None) -> int | None:
    """The exit status; a kill by time is sent from here."""
    to_send = [kill.number] * (2 if kill.again else 1) if kill is not None and kill.seconds else []
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        passed = time.monotonic() - started
        if to_send and kill is not None and passed >= kill.seconds:
            for number in to_send:
                os.kill(child, number)
            to_send = []
        if passed > LIMIT_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def _require_one_thread() -> None:
    tasks = Path("/proc/self/task")
    count = len(list(tasks.iterdir())) if tasks.is_dir() else 1
    if count != 1:
        raise RuntimeError(f"{count} threads run here; a fork would copy one of them and the locks of all")
