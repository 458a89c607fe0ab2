"""With `--json` standard output holds one object: what a library prints meanwhile goes to standard error."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress


@contextmanager
def kept_for_json(as_json: bool) -> Iterator[None]:
    """Send all that is printed inside to stderr, also from native code and child processes."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        with suppress(OSError, AttributeError):  # what C's printf holds back would come out after the object
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
