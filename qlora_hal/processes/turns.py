"""One thread at a time where libraries change what the whole process shares.

Architectures are built with torch's default dtype and accelerate's `nn.Module.register_parameter` exchanged, imports
and probes with `sys.stdout`. Each puts back what it found, so of two threads inside at once the last to leave would
leave the other's change behind, for good; and each would build with what the other had set.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Turn:
    def __init__(self) -> None:
        self._begin_anew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """In a child by fork, too: the thread whose turn it was is gone there, and would keep it for ever."""
        self.lock = threading.RLock()


_OF_THIS_PROCESS = _Turn()


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Wait for the turn of this thread, and keep it; it may be entered again inside. No code of a caller runs there: a
    thread that it waits for might wait for its turn."""
    with _OF_THIS_PROCESS.lock:
        yield
