"""A stream that never fails: a run is not worth less because nobody can read of it any more.

A closed terminal, a reader that went away (`2>&1 | head`) or a full disk under a redirected stream make every write
fail; the work goes on without a word then, and what stood in the way can be told in the end.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, TextIO


class LastingStream:
    """Writes to `stream` as long as that can be written to. `problem` is what stood in the way, once something did.

    A file descriptor that fails is pointed at nothing, so that what its buffer still holds goes there when Python ends,
    instead of an exit status of 120.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.problem: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None and self.problem is None:
            try:
                return self._stream.write(text)
            except OSError as problem:
                self._give_up(problem)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None and self.problem is None:
            try:
                self._stream.flush()
            except OSError as problem:
                self._give_up(problem)

    def isatty(self) -> bool:
        return self._stream is not None and self.problem is None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, problem: OSError) -> None:
        self.problem = problem
        with suppress(OSError, ValueError):  # a stream without a descriptor keeps what it holds to itself
            lead_nowhere(self.fileno())


def lead_nowhere(descriptor: int) -> None:
    """What is written there from now on is gone, and no error."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def lasting(stream: TextIO | LastingStream | None) -> LastingStream:
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)
