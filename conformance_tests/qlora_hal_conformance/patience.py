"""How long a process has had to answer: the time that passed, without what it stood waiting for a processor.

A slow machine is no fault. On one that is busy with other work a child is ready to run most of the time and seldom
runs; Linux counts that waiting for each thread. Where nothing counts it, all time that passed is the child's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

SAMPLE_SECONDS = 0.5
_PROC = Path("/proc")
Waits = Mapping[str, float]
"""Thread id -> seconds that it has stood waiting for a processor since it began."""


class Patience:
    """A clock of the processes of one group: `start` sets it to zero, `spent` reads it in seconds."""

    def __init__(
        self, group: int, *, now: Callable[[], float] = time.monotonic, waits: Callable[[int], Waits] | None = None
    ) -> None:
        self._group, self._now, self._waits_of = group, now, waits or waits_of_group
        self._spent, self._seen, self._sampled = 0.0, now(), now()
        self._waits = self._waits_of(group)

    def start(self) -> None:
        self._spent, self._seen = 0.0, self._now()

    def spent(self) -> float:
        """Every thread may wait at once, so the one that waited longest tells what of the time was the machine's."""
        now = self._now()
        if now - self._sampled >= SAMPLE_SECONDS:
            waits = self._waits_of(self._group)
            # A thread that began since has no earlier figure, and waited at most since then.
            waited = max((wait - self._waits.get(thread, 0.0) for thread, wait in waits.items()), default=0.0)
            self._waits, self._sampled = waits, now
            self._spent += max(now - self._seen - max(waited, 0.0), 0.0)
            self._seen = now
        return self._spent


def waits_of_group(group: int) -> Waits:
    """What Linux says of every thread of a process group; nothing elsewhere."""
    return dict(_waits(group))


def _waits(group: int) -> Iterator[tuple[str, float]]:
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold spaces; the group is the third field behind it.
            fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) != group:
                continue
            for thread in (process / "task").iterdir():
                with suppress(OSError, ValueError, IndexError):
                    yield thread.name, int((thread / "schedstat").read_text().split()[1]) / 1e9
