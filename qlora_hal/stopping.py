"""Stopping on request: the first signal finishes the step and saves, a second one ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP (a closed terminal) does not exist on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def stop_on_signals(announce: Callable[[str], None]) -> Iterator[Callable[[], str]]:
    """Gives a function that returns the name of the signal that asked to stop, or an empty text.

    Handlers are only possible in the main thread; elsewhere the owner of the process decides, and nothing is caught.
    """
    asked: list[str] = []
    announced: list[str] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
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

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
