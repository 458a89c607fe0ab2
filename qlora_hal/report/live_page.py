"""report.html of a run in progress: written anew now and then, and loaded again by whoever has it open."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.errors import QloraHalError
from qlora_hal.report.html import RELOADING_SECONDS, write_report

_SHARE_OF_TIME = 1 / 200
"""Of a run's time that its page may take at most: a long run has long curves to read."""


@dataclass(slots=True)
class LivePage:
    """The page of a run in `run_dir`; a run that is over before the first is due has none but that of its end. `clock`
    tells seconds."""

    run_dir: Path
    clock: Callable[[], float] = time.monotonic
    _due: float | None = None

    def refresh(self) -> None:
        """Write the page if it is old enough. A page that cannot be written never stops a run: its end tells."""
        began = self.clock()
        if self._due is None:
            self._due = began + RELOADING_SECONDS
        if began < self._due:
            return
        with suppress(QloraHalError, OSError, MemoryError):
            write_report(self.run_dir, in_progress=True)
        ended = self.clock()
        self._due = ended + max(RELOADING_SECONDS, (ended - began) / _SHARE_OF_TIME)
