"""A question to a fresh interpreter: a crash, a hang, an exit or prints of what it imports are its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, TextIO

from qlora_hal.processes import child_process

_LINE = 500


class SubprocessCallError(Exception):
    """Why a child gave no answer, as the end of a sentence about it. `waited` is how many seconds it had, where it was
    slow rather than wrong; `signal` what ended it, where something did."""

    def __init__(self, reason: str, *, waited: float | None = None, signal: int | None = None) -> None:
        super().__init__(reason)
        self.waited = waited
        self.signal = signal


def ask(module: str, *arguments: str, seconds: float) -> Mapping[str, Any]:
    """The JSON object that `python -m module` writes on its `answer_stream`. Raises SubprocessCallError."""
    # Files, not pipes: a process that the child leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        child = child_process.start(child_process.module_command(module, *arguments), stdout=said, stderr=complained)
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            load = load_of_machine()
            busy = f", while the machine was busy ({load})" if load else ""
            raise SubprocessCallError(f"did not respond within {seconds:.0f} s{busy}", waited=seconds) from None
        finally:
            child_process.ended(child)
        answer, errors = _text(said), _text(complained)
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    last = (errors.strip().splitlines() or ["no message"])[-1]
    signal = -child.returncode if child.returncode < 0 else None
    ending = f"signal {signal}" if signal else f"exit status {child.returncode}"
    raise SubprocessCallError(f"ended with {ending} and no response: {one_line(last)}", signal=signal)


def load_of_machine() -> str:
    """`load 7.3 on 2 processors` where more wants to run than can, averaged over a minute; else, and where the system
    does not tell, nothing."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return ""
    processors = os.cpu_count() or 1
    return f"load {load:.1f} on {processors} processors" if load > processors else ""


def answer_stream() -> TextIO:
    """In the child: where the answer goes. Whatever is printed, at import or from native code, goes to stderr. Once the
    parent is gone, nobody waits for an answer, and the child ends."""
    child_process.end_with_parent()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def one_line(text: object) -> str:
    """A foreign text as it may stand in a terminal: one line of bounded length, no control characters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return plain if len(plain) <= _LINE else f"{plain[:_LINE]} ..."


def _text(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode("utf-8", errors="replace")
    return text
