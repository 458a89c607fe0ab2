"""Stopping on request. While steps are taken the first signal finishes the step and saves, a second one ends at once;
before and after there is nothing to finish, and the first one ends at once. SIGUSR1, a scheduler's early warning, saves
and goes on, and never ends anything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from qlora_hal.errors.way_on import resume_line

# SIGHUP (a closed terminal) and SIGUSR1 do not exist on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAVE: signal.Signals | None = getattr(signal, "SIGUSR1", None)

Handler = Callable[[int, FrameType | None], object]


class EndedAtOnce(KeyboardInterrupt):
    """What was under way is given up. Who knows the run's folder adds it, and the newest step saved there. `again`: a
    signal before had asked to stop, and was being heeded."""

    def __init__(self, number: int, *, again: bool = True) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.again = again
        self.run_dir: Path | None = None
        self.safe_step: int | None = None

    def learn_of_run(self) -> None:
        """Where this one came while an earlier one was unwinding a run: what was known of that run holds."""
        earlier = self.__context__
        while self.run_dir is None and earlier is not None:
            if isinstance(earlier, EndedAtOnce):
                self.run_dir, self.safe_step = earlier.run_dir, earlier.safe_step
            earlier = earlier.__context__

    @property
    def name(self) -> str:
        """Of the signal: `SIGTERM`."""
        return signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """As a shell shows a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        if self.run_dir is None:
            return f"ended immediately by {self.name}; what was in progress is not done."
        if self.safe_step is None:
            return f"ended immediately by {self.name}; no step was saved yet, start again."
        return (
            f"ended immediately by {self.name}; step {self.safe_step} is safe on disk. "
            f"Resume with: {resume_line(self.run_dir)}"
        )


def signals_to_handle() -> tuple[signal.Signals, ...]:
    """Those that ask a process to end, but for any that it was started to ignore: nohup does so with SIGHUP."""
    return tuple(number for number in _SIGNALS if not _is_ignored(number))


def ignored_note() -> str:
    """What to say of requests to stop, or to save, that will not be heard; empty where all are."""
    known = (*_SIGNALS, *([_SAVE] if _SAVE is not None else []))
    ignored = [number.name for number in known if _is_ignored(number)]
    if not ignored or threading.current_thread() is not threading.main_thread():
        return ""
    heard = [number.name for number in signals_to_handle()]
    way_out = f"{' or '.join(heard)} stops it" if heard else "nothing but SIGKILL stops it"
    return (
        f"this process ignores {' and '.join(ignored)} (as after nohup, or & in a script), and so does the run; "
        f"{way_out}"
    )


@dataclass(slots=True)
class Requests:
    """What signals asked for. Announced when the loop asks, and not in the handler: that may interrupt a print, which
    must not be entered twice."""

    announce: Callable[[str], None]
    _stop: signal.Signals | None = None
    _save: bool = False
    _announced: bool = False
    _waits: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVE:
            self._save = True
            return
        again, self._stop = self._stop is not None, signal.Signals(number)
        if again or not self._waits:
            raise EndedAtOnce(number, again=again)

    def stop(self) -> str:
        """The name of the signal that asked to stop, or an empty text."""
        if self._stop is None:
            return ""
        if not self._announced:
            self._announced = True
            self.announce(
                f"{self._stop.name}: stopping after this step; the state will be saved. A second one ends the run "
                "immediately."
            )
        return self._stop.name

    def save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        if asked:
            self.announce("SIGUSR1: saving after this step, then continuing.")
        return asked

    @contextmanager
    def heeded_between_steps(self) -> Iterator[None]:
        """While steps are taken: a first request waits for whoever asks `stop`. One that came too late for that ends
        the run when the steps are done."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self._stop is not None and not self._announced:
            raise EndedAtOnce(self._stop, again=False)

    @contextmanager
    def too_late(self) -> Iterator[None]:
        """While what is done is told and written down: a first request has nothing left to stop."""
        waited, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = waited
        if self._stop is not None and not self._announced:
            self._announced = True
            self.announce(f"{self._stop.name}: there was nothing left to stop.")
        if self._save:
            self._save = False
            self.announce("SIGUSR1: there was nothing left to save.")


@contextmanager
def requests_by_signal(announce: Callable[[str], None]) -> Iterator[Requests]:
    """For the whole of a run. Only the main thread can have handlers; elsewhere the owner of the process decides, and
    nothing is caught."""
    requests = Requests(announce)
    saving = _saving()
    with _handled([*signals_to_handle(), *saving], requests.on_signal), _deliverable(saving):
        yield requests


@contextmanager
def handing_on(send: Callable[[int], object]) -> Iterator[set[int]]:
    """While another process does the work: what is asked of this one is asked of that one by `send`. Gives the signals
    that were handed on."""
    handed: set[int] = set()

    def hand_on(number: int, frame: FrameType | None) -> None:
        handed.add(number)
        send(number)

    saving = _saving()
    with _handled([*signals_to_handle(), *saving], hand_on), _deliverable(saving):
        yield handed


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """For the whole of a command: a request to stop unwinds it, so that its children end and its scratch folders go.
    A request to save waits for a run, if there is one; without any it ends nothing."""
    with _handled(signals_to_handle(), _end_at_once), held_back():
        try:
            yield
        finally:
            _drop_waiting()


@contextmanager
def held_back() -> Iterator[None]:
    """Requests to save wait in the kernel meanwhile. A child that is started here never gets any: schedulers send them
    to all processes of a job, and would end those that know nothing of it."""
    if _SAVE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [_SAVE])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drop_waiting() -> None:
    """To be ignored for a moment discards a signal that waits (POSIX)."""
    if _SAVE is None or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.signal(_SAVE, signal.SIG_IGN)
    if handler is not None:
        signal.signal(_SAVE, handler)


@contextmanager
def _deliverable(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Take what was held back."""
    chosen = list(numbers)
    if not chosen or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, chosen)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # None: one that was not set from Python, which cannot be set again
                signal.signal(number, earlier)


def _saving() -> list[signal.Signals]:
    return [_SAVE] if _SAVE is not None and not _is_ignored(_SAVE) else []


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    raise EndedAtOnce(number, again=False)
