"""What all tests may ask for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@pytest.fixture(scope="session", autouse=True)
def signals_of_the_foreground() -> Iterator[None]:
    """For all that is made before a test, too."""
    with _as_in_the_foreground():
        yield


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Again for each test that changes what is done with them."""
    with _as_in_the_foreground():
        yield


@contextmanager
def _as_in_the_foreground() -> Iterator[None]:
    """Signals as a shell in the foreground leaves them. Under nohup SIGHUP is ignored, and after & in a script SIGINT;
    a child inherits what its parent ignores, and a signal that is sent there is never heard of again."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        usual |= {signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
