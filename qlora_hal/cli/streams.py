"""The three streams of a command, whatever they were when it was started: closed, full, or with a reader that left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_hal.errors import StorageError
from qlora_hal.report.lasting_stream import LastingStream


@contextmanager
def usable_streams() -> Iterator[LastingStream]:
    """No write fails inside, and no file of ours is opened under the number of a stream that was closed. Gives standard
    output, whose `problem` is then to be told."""
    _open_closed()
    before = sys.stdout, sys.stderr
    output = LastingStream(sys.stdout)
    sys.stdout, sys.stderr = output, LastingStream(sys.stderr)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


def output_error(why: str) -> StorageError:
    """A result that was asked for and is not out."""
    return StorageError(
        "QH-S11",
        "The result could not be written to standard output.",
        where="standard output",
        cause=why,
        fix="Redirect it to a file or a pipe that can be written; everything else the command had to do is done.",
    )


def _open_closed() -> None:
    """The next file that is opened takes the lowest number that is free. Were that 1, a lock or a log of ours would get
    what is printed. Standard output becomes one that refuses, so that a result that was asked for is missed."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
