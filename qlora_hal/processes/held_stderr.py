"""What a library writes to the error stream by itself, held back until it is known whether it is to be shown."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

STDERR = 2
_ONE_AT_A_TIME = threading.Lock()
"""The stream is the process's: while one call holds it, another thread's call runs as if there were no such thing."""


class HeldStderr:
    """What was written until now can be dropped."""

    def __init__(self) -> None:
        self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True


@contextmanager
def held_stderr() -> Iterator[HeldStderr]:
    """Around a call of a library that prints what it then raises: all that is written meanwhile to the descriptor, by
    whichever language or thread, is written on at the end, unless it was dropped."""
    held = HeldStderr()
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        yield held
        return
    try:
        with _stderr_in_a_file(held):
            yield held
    finally:
        _ONE_AT_A_TIME.release()


@contextmanager
def _stderr_in_a_file(held: HeldStderr) -> Iterator[None]:
    with ExitStack() as opened:
        try:
            real = os.dup(STDERR)
            opened.callback(os.close, real)
            kept = opened.enter_context(tempfile.TemporaryFile(buffering=0))
        except OSError:  # it is closed, or there is no room for a file
            yield
            return
        os.dup2(kept.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(real, STDERR)
            if not held.is_dropped:
                _write_on(kept)


def _write_on(kept: IO[bytes]) -> None:
    kept.seek(0)
    with suppress(OSError):
        while some := kept.read(2**16):
            os.write(STDERR, some)
