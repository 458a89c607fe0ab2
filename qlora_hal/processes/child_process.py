"""Children that do not outlive their parent, and that no signal ends which was meant for it.

The parent holds the writing end of the child's standard input, and nobody else does: its end of file tells the child
that the parent is gone, however it went. No polling, no process id that could be another's by now.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

from qlora_hal.processes.signals import held_back


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module by this interpreter. -P: what lies in the working folder is no module; that may
    be the folder of a stranger's model."""
    return [sys.executable, "-P", "-m", module, *arguments]


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` with a standard input that stays open as long as the parent lives, and without requests to
    save (SIGUSR1), which a scheduler sends to every process of a job."""
    with held_back():
        return subprocess.Popen(command, stdin=subprocess.PIPE, **options)


def ended(child: subprocess.Popen[Any]) -> None:
    """Whatever happened: the child is gone, and is no zombie. One that has ended takes no harm."""
    child.kill()
    close_quietly(child.stdin)
    child.wait()


def close_quietly(pipe: IO[Any] | None) -> None:
    """A pipe that nobody reads any more has nothing to complain of."""
    if pipe is not None:
        try:
            pipe.close()
        except OSError:  # what was still to be written has no reader
            return


def end_with_parent(end: Callable[[], object] | None = None) -> None:
    """In the child, when it has read what it was sent: call `end` (by default: be gone) when the parent is gone.

    What reads standard input afterwards finds it empty. Does nothing where that is no pipe: people start these modules
    by hand, too.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    watched, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(watched, 4096):
            pass
        (end or be_gone)()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def be_gone() -> None:
    """Nobody is left to hear of an orderly end."""
    os._exit(1)


def ask_to_stop() -> None:
    """As a user would: what can be saved is saved."""
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_starter() -> None:
    """For a process without a pipe to whoever started it: to be asked to stop when that one has died (Linux,
    PR_SET_PDEATHSIG of prctl(2)); elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
