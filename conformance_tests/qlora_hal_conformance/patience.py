"""How long a case may take: by the time in which it could have run, so that a busy machine is no hang."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

_NANOSECONDS = 1e-9


@dataclass(slots=True)
class Patience:
    """The clock of one wait for a process of a session of its own. It stands still while a thread of the session is
    ready to run and no processor is free for it, where the system tells (Linux); elsewhere it is an ordinary clock."""

    session: int
    _since: float = field(default_factory=time.monotonic)
    _starved: float = 0.0

    def restart(self) -> None:
        """There was a sign of life."""
        self._since, self._starved = time.monotonic(), starved_seconds(self.session)

    def is_over(self, limit: float) -> bool:
        waited = time.monotonic() - self._since
        # Asked last: it looks at every process.
        return waited > limit and waited - max(starved_seconds(self.session) - self._starved, 0.0) > limit


def starved_seconds(session: int) -> float:
    """The longest that any thread of a session has waited for a processor so far (Linux, Documentation/scheduler/
    sched-stats: the second figure of `schedstat`); 0 where it is not told."""
    longest = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.getsid(int(process.name)) == session:
                told = [(task / "schedstat").read_text().split() for task in (process / "task").iterdir()]
                longest = max(longest, *(int(figures[1]) for figures in told))
    return longest * _NANOSECONDS
