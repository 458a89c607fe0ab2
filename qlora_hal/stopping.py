"""Stopping on request: the first signal finishes the step and saves, a second one ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# SIGHUP (a closed terminal) does not exist on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


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


@contextmanager
def stop_on_signals(announce: Callable[[str], None]) -> Iterator[Callable[[], str]]:
    """Gives a function that returns the name of the signal that asked to stop, or an empty text.

    Handlers are only possible in the main thread; elsewhere the owner of the process decides, and nothing is caught.
    """
    asked: list[str] = []
    announced: list[str] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise EndedAtOnce(number)
        asked.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def requested() -> str:
        # Announced here and not in the handler: that may interrupt a print, which must not be entered twice.
        if asked and not announced:
            announced.append(asked[0])
            announce(f"{asked[0]}: stopping after this step; the state will be saved. Once more ends at once.")
        return asked[0] if asked else ""

    before = {number: signal.signal(number, on_signal) for number in signals_to_handle()}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
