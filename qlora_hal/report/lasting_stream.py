"""A stream that never fails: a run is not worth less because nobody can read of it any more.

A closed terminal, a reader that went away (`2>&1 | head`) or a full disk under a redirected stream make every write
fail; the work goes on without a word then, and what stood in the way can be told in the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


class LastingStream:
    """Writes to `stream` as long as that can be written to. `problem` is what stood in the way, once something did.

    A file descriptor that fails is pointed at nothing, so that what its buffer still holds goes there when Python ends,
    instead of an exit status of 120. A stream is whatever the program put there: one that it closed, or that raises
    anything else, ends no run. What its encoding has no form for is escaped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.problem: Exception | None = None
        self._stream = stream

    @property
    def why(self) -> str:
        """The problem in words; empty without one."""
        if isinstance(self.problem, OSError) and self.problem.errno:
            return os.strerror(self.problem.errno)
        return "" if self.problem is None else str(self.problem).rstrip(".") or type(self.problem).__name__

    def write(self, text: str) -> int:
        return self._tried(lambda stream: _written(stream, text), len(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._tried(lambda stream: stream.flush(), None)

    def isatty(self) -> bool:
        return self._tried(lambda stream: stream.isatty(), False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _tried(self, act: Callable[[TextIO], T], otherwise: T) -> T:
        if self._stream is None or self.problem is not None:
            return otherwise
        try:
            return act(self._stream)
        except Exception as problem:
            self.problem = problem
            if isinstance(problem, OSError):
                with suppress(OSError, ValueError):  # a stream without a descriptor keeps what it holds to itself
                    lead_nowhere(self.fileno())
            return otherwise


def _written(stream: TextIO, text: str) -> int:
    try:
        return stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding
        return stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def lead_nowhere(descriptor: int) -> None:
    """What is written there from now on is gone, and no error."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def lasting(stream: TextIO | LastingStream | None) -> LastingStream:
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)
