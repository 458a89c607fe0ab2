"""Chat templates of strangers, rendered in a process of their own that is ended when it takes too much.

The sandbox (sandbox.py) stops a template between its steps; one step can be long or large. Here the process
around it has an end: processor time and memory are watched from outside, on every system, and the address space is
bounded by the system where it can be (child.py). The process is started when it is first needed, serves all
templates of its parent, and ends when it was not needed for a while.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from qlora_hal.data.template.compiled import CompiledTemplate
from qlora_hal.data.template.sandbox import (
    Looked,
    StandIn,
    TemplateFault,
    TooMuch,
    seconds_allowed,
    shown,
)
from qlora_hal.data.template.turn_marks import Rendering
from qlora_hal.errors import BackendError
from qlora_hal.errors.redaction import is_secret_variable
from qlora_hal.processes.child_process import module_command

UNREAD = "\ufdd2"
"""The key that encloses a stand-in in a request; also the sign that stand-ins show to whoever reads them."""

_CHILD = "qlora_hal.data.template.child"
_MEMORY_FLOOR, _MEMORY_PER_BYTE = 192 * 2**20, 64
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_KEPT = 20.0
_QUICK_TO_COMPILE, _MOST_DECLINED = 0.25, 8
_ENDINGS = ("out_of_memory", "too_much", "fault")
_SECONDS_OF_GRACE = 0.25
"""What the process may take beyond the sandbox's own limit, whose message says more."""


def memory_allowed(request_bytes: int) -> int:
    """Bytes that the child may take to answer a request of this length, beyond what it had at its start."""
    return _MEMORY_FLOOR + _MEMORY_PER_BYTE * request_bytes


class StrangersTemplate:
    """A template that is rendered here while it does nothing but what is quick, else in the child process."""

    def __init__(self, source: str) -> None:
        """Raises TemplateFault when it is no template, TooMuch."""
        self._contained = ContainedTemplate(source)
        self._quick: CompiledTemplate | None = None
        self._declined = 0
        if self._contained.seconds_to_compile < _QUICK_TO_COMPILE:
            with suppress(TooMuch, TemplateFault):  # this thread's stack may be deeper than that of the child
                self._quick = CompiledTemplate(source, quick=True)

    def render(self, variables: Mapping[str, object], *, turns: int, most: int) -> Rendering:
        """As CompiledTemplate."""
        if self._quick is not None:
            try:
                return self._quick.render(variables, turns=turns, most=most)
            except TooMuch:
                self._declined += 1
                if self._declined == _MOST_DECLINED:
                    self._quick = None
        return self._contained.render(variables, turns=turns, most=most)


class ContainedTemplate:
    """A template that is compiled and rendered in the child process."""

    def __init__(self, source: str) -> None:
        """Raises TemplateFault when it is no template, TooMuch."""
        self._key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._compiling = json.dumps({"key": self._key, "source": source})
        self.seconds_to_compile: float = _child().ask([self._compiling])["seconds"]

    def render(self, variables: Mapping[str, object], *, turns: int, most: int) -> Rendering:
        """As CompiledTemplate. Stand-ins among the variables are told what was done with them."""
        stand_ins: list[StandIn] = []
        request = {"key": self._key, "variables": variables, "turns": turns, "most": most, "unread": False}
        line = _as_line(request)
        if "\\ufdd2" in line:
            enclosed = _enclosed(variables, stand_ins)
            line = _as_line({**request, "variables": enclosed, "unread": bool(stand_ins)})
        answer = _child().ask([self._compiling, line], turns)
        for stand_in in stand_ins:
            stand_in.tell(looked=answer["looked"], asked=answer["asked"])
        if answer["looked"]:
            raise Looked
        return Rendering.from_json(answer["rendering"])


def _as_line(request: Mapping[str, object]) -> str:
    try:
        return json.dumps(request, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateFault(f"it cannot be given these values ({error})") from error


def _enclosed(value: Any, found: list[StandIn]) -> Any:
    if isinstance(value, StandIn):
        found.append(value)
        return {UNREAD: shown(value)}
    if isinstance(value, Mapping):
        return {key: _enclosed(item, found) for key, item in value.items()}
    return [_enclosed(item, found) for item in value] if isinstance(value, list | tuple) else value


class _Child:
    """The process and the two locks around it: one request at a time, one look at the process at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _WatchedProcess | None = None

    def ask(self, requests: Sequence[str], turns: int = 0) -> Mapping[str, Any]:
        """The answer to the last of these requests, lines whose first prepare it where the process does not know the
        template yet. Raises TemplateFault, and TooMuch when there is no answer within the limits."""
        with self._lock:
            # A new process may answer where one fails in memory that earlier requests have left in pieces, or has ended
            # since it was last asked.
            for asked in (requests[-1:], requests, requests):
                was_running = self._process is not None and self._process.usable
                if asked is not requests and not was_running:
                    continue
                answer = self._answer(asked, turns)
                again = was_running and not answer.keys().isdisjoint(("out_of_memory", "ended"))
                if "unknown" not in answer and not again:
                    break
        if "out_of_memory" in answer:
            raise TooMuch("takes more memory than its input could need")
        if "too_much" in answer:
            raise TooMuch(answer["too_much"])
        if "fault" in answer:
            raise TemplateFault(answer["fault"])
        return answer

    def end(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._let_go()

    def _answer(self, requests: Sequence[str], turns: int) -> Mapping[str, Any]:
        if self._process is None or not self._process.usable:
            self._let_go()
            self._process = _WatchedProcess()
        for request in requests:
            answer = self._process.answer(request, turns)
            if not answer.keys().isdisjoint(_ENDINGS):
                break
        if not self._process.usable or "out_of_memory" in answer:
            self._let_go()
        return answer

    def _let_go(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None


@functools.cache
def _child() -> _Child:
    child = _Child()
    atexit.register(child.end)
    return child


class _WatchedProcess:
    """One process from its start to its end, and the thread that watches it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process = _started()
        self._request: _Request | None = None
        self._needed = threading.Event()
        self._ended_for = ""
        self._state = threading.Lock()
        if self._exchanged(b"") is None:
            ending = self._ending()
            self.end()
            raise _not_started(ending)
        threading.Thread(target=self._watch, name="template-process", daemon=True).start()

    @property
    def usable(self) -> bool:
        """Whether it can be asked: it lives, and is not that of a process of which this one is a copy."""
        with self._state:
            return self._owner == os.getpid() and self._process.poll() is None and not self._ended_for

    def answer(self, line: str, turns: int) -> Mapping[str, Any]:
        raw = line.encode("ascii") + b"\n"
        with self._state:
            self._request = _Request(len(raw), turns)
        self._needed.set()
        try:
            answer = self._exchanged(raw)
        finally:
            with self._state:
                self._request = None
        if answer is not None:
            return answer
        if self._ended_for:
            return {"too_much": self._ended_for}
        ending = f"ended its process ({self._ending()})"
        return {"too_much": ending, "ended": ending}

    def end(self) -> None:
        """End the process, whatever it does, and close its streams; a copy of this process closes its own alone."""
        self._needed.set()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _exchanged(self, raw: bytes) -> Mapping[str, Any] | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(raw)
            self._process.stdin.flush()
            found = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _ending(self) -> str:
        status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def _watch(self) -> None:
        process = psutil.Process(self._process.pid)
        with suppress(psutil.Error):
            while self._process.poll() is None:
                if not self._needed.wait(_SECONDS_KEPT):
                    if self._ended_when_idle():
                        return
                    continue
                with self._state:
                    request = self._request
                    if request is None:
                        self._needed.clear()
                        continue
                times, memory = process.cpu_times(), process.memory_info().rss
                reason = request.reason_to_end(times.user + times.system, memory)
                with self._state:
                    if reason and self._request is request:
                        self._ended_for = reason
                        self._process.kill()
                        return
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _ended_when_idle(self) -> bool:
        with self._state:
            if self._request is not None or self._needed.is_set():
                return False
            self._ended_for = "was not needed"
        self.end()
        return True


class _Request:
    """What one request may take; counted from the first look at the process."""

    def __init__(self, byte_count: int, turns: int) -> None:
        # JSON has at least a quarter of the size that the sandbox counts for it.
        self._seconds = seconds_allowed(4 * byte_count, turns) + _SECONDS_OF_GRACE
        self._memory = memory_allowed(byte_count)
        self._at_first: tuple[float, int] | None = None

    def reason_to_end(self, seconds: float, memory: int) -> str:
        if self._at_first is None:
            self._at_first = (seconds, memory)
        if seconds - self._at_first[0] > self._seconds:
            return f"runs longer than {self._seconds:.3g} seconds"
        if memory - self._at_first[1] > self._memory:
            return "takes more memory than its input could need"
        return ""


def _not_started(ending: str) -> BackendError:
    return BackendError(
        "QH-E66",
        f"The process that renders chat templates ended before its first response ({ending}).",
        cause=f"A model's template is untrusted code; it runs in a process of its own, {sys.executable}.",
        fix="Free memory and try again, or set data.chat_template to a built-in template, which needs no process.",
    )


def _started() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])
    environment = {name: value for name, value in os.environ.items() if not is_secret_variable(name)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    try:
        return subprocess.Popen(
            module_command(_CHILD),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise _not_started(error.strerror or str(error)) from error
