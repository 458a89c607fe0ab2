"""Stopping on request: the first signal finishes the step and saves, a second one ends at once. SIGUSR1, a scheduler's
early warning, saves and goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# SIGHUP (a closed terminal) does not exist on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


_SAVE = getattr(signal, "SIGUSR1", None)


class EndedAtOnce(KeyboardInterrupt):
    """A second signal: the step is given up. Who knows the run's folder adds it, and the newest step saved there."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.run_dir: Path | None = None
        self.safe_step: int | None = None

    @property
    def exit_status(self) -> int:
        """As a shell shows a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        if self.run_dir is None or self.safe_step is None:
            return f"ended at once by {self.args[0]}; no step was saved yet, start again."
        return (
            f"ended at once by {self.args[0]}; step {self.safe_step} is safe on disk. "
            f"Go on with: qlora-hal resume {self.run_dir}"
        )


def signals_to_handle() -> tuple[signal.Signals, ...]:
    """Those that ask a process to end, but for any that it was started to ignore: nohup does so with SIGHUP."""
    return tuple(number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


@dataclass(slots=True)
class Requests:
    """What signals asked for. Announced when the loop asks, and not in the handler: that may interrupt a print, which
    must not be entered twice."""

    announce: Callable[[str], None]
    _stop: str = ""
    _save: bool = False
    _announced: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVE:
            self._save = True
            return
        if self._stop:
            raise EndedAtOnce(number)
        self._stop = signal.Signals(number).name

    def stop(self) -> str:
        """The name of the signal that asked to stop, or an empty text."""
        if self._stop and not self._announced:
            self._announced = True
            self.announce(f"{self._stop}: stopping after this step; the state will be saved. Once more ends at once.")
        return self._stop

    def save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        if asked:
            self.announce("SIGUSR1: saving after this step, and going on.")
        return asked


@contextmanager
def requests_by_signal(announce: Callable[[str], None]) -> Iterator[Requests]:
    """Only the main thread can have handlers; elsewhere the owner of the process decides, and nothing is caught."""
    requests = Requests(announce)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    handled = [*signals_to_handle(), *([_SAVE] if _SAVE is not None else [])]
    before = {number: signal.signal(number, requests.on_signal) for number in handled}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
