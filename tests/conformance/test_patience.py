"""The clock of a case stands still while its process gets no processor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_hal_conformance.patience import Patience

Start = Callable[[str], int]
LIMIT = 0.5
CROWDED = (
    "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); [os.fork() for _ in range(4)]\nwhile True: 0"
)
"""Sixteen processes that compute on one processor: each waits for most of the time."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program in a session of its own; the whole session ends with the test."""
    children: list[subprocess.Popen[bytes]] = []

    def started(program: str) -> int:
        children.append(subprocess.Popen([sys.executable, "-c", program], start_new_session=True))
        return children[-1].pid

    yield started
    for child in children:
        os.killpg(child.pid, 9)
        child.wait()


def test_process_that_does_nothing_is_out_of_time(start: Start) -> None:
    patience = Patience(start("import time; time.sleep(60)"))
    assert not patience.is_over(LIMIT)
    time.sleep(2 * LIMIT)
    assert patience.is_over(LIMIT)


def test_sign_of_life_starts_the_clock_again(start: Start) -> None:
    patience = Patience(start("import time; time.sleep(60)"))
    time.sleep(2 * LIMIT)
    patience.restart()
    assert not patience.is_over(LIMIT)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells how long a process had to wait")
def test_process_that_gets_no_processor_has_time_left(start: Start) -> None:
    patience = Patience(start(CROWDED))
    time.sleep(4 * LIMIT)
    assert not patience.is_over(2 * LIMIT)
