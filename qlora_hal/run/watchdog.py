"""A word when no step ends for a long time: a device, a file system or a driver may hang without ever raising."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

QUIET_SECONDS = 600.0
USUAL_STEPS = 20.0


class Watchdog:
    """Tells when no step ended for `quiet_seconds`, or for twenty times the usual step where that is longer; again when
    that time has doubled. `with` bounds its life."""

    def __init__(self, tell: Callable[[str], None], *, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._tell = tell
        self._quiet_seconds = quiet_seconds
        self._usual = 0.0
        self._last = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, usual_seconds: float) -> None:
        """A step ended; `usual_seconds` is what one takes."""
        self._usual, self._last = usual_seconds, time.monotonic()

    def _watch(self) -> None:
        since, times = self._last, 1
        while not self._ended.wait(max(0.0, self._last + times * self._patience() - time.monotonic())):
            if since != self._last:
                since, times = self._last, 1
            elif (quiet := time.monotonic() - since) >= times * self._patience():
                self._tell(self._words(quiet))
                times *= 2

    def _patience(self) -> float:
        return max(self._quiet_seconds, USUAL_STEPS * self._usual)

    def _words(self, quiet: float) -> str:
        usual = f"; one usually takes {self._usual:.1f} s" if self._usual else ""
        return (
            f"no step has finished for {quiet:.0f} s{usual}. An evaluation or a save may be in progress; if not, "
            "stop the run and resume it"
        )
