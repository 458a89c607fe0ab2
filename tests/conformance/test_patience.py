"""A slow machine is no fault: what a busy one takes of a case's time does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qlora_hal_conformance.patience import Patience, waits_of_group


class Machine:
    """A clock, and how long each thread has waited for a processor."""

    def __init__(self) -> None:
        self.time, self.waits = 100.0, {"1": 5.0}

    def patience(self) -> Patience:
        return Patience(0, now=lambda: self.time, waits=lambda group: dict(self.waits))


def test_time_on_an_idle_machine_is_the_child_s_own() -> None:
    machine = Machine()
    patience = machine.patience()
    for _ in range(4):
        machine.time += 1.0
        patience.spent()
    assert patience.spent() == 4.0
    patience.start()
    assert patience.spent() == 0.0


def test_time_in_the_queue_of_a_busy_machine_is_not() -> None:
    machine = Machine()
    patience = machine.patience()
    machine.time += 10.0
    machine.waits["1"] += 9.0
    assert patience.spent() == pytest.approx(1.0)


def test_thread_that_waited_longest_tells_and_a_new_one_has_no_past() -> None:
    machine = Machine()
    patience = machine.patience()
    machine.time += 10.0
    machine.waits |= {"1": 6.0, "2": 4.0}
    assert patience.spent() == pytest.approx(6.0)


def test_child_that_sleeps_uses_up_its_time_and_one_in_the_queue_is_seen_there() -> None:
    """By what this system tells of real processes: several that compute on one processor wait for it."""
    if not hasattr(os, "sched_setaffinity"):
        assert waits_of_group(os.getpgrp()) == {}
        return
    one = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{one}}})\nwhile True: pass"
    children = [subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) for _ in range(3)]
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        time.sleep(0.5)
        queued, sleeping = Patience(children[0].pid), Patience(sleeper.pid)
        time.sleep(2.0)
        assert queued.spent() < 0.75 * sleeping.spent()
    finally:
        for child in (*children, sleeper):
            child.kill()
            child.wait()
