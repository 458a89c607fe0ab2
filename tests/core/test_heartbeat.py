"""A run in which nothing moves says so; one that moves says nothing."""

from __future__ import annotations

import time

import pytest

from qlora_hal.run.watchdog import Watchdog


@pytest.mark.fault("N17")
def test_silence_is_told_and_told_again_when_it_has_doubled() -> None:
    told: list[str] = []
    with Watchdog(told.append, quiet_seconds=0.2) as watchdog:
        watchdog.beat(0.001)
        while len(told) < 3:  # after 0.2, 0.4 and 0.8 s
            time.sleep(0.05)
    assert "no step has finished for 0 s; one usually takes 0.0 s" in told[0]
    time.sleep(0.2)
    count = len(told)
    time.sleep(1.6)
    assert len(told) == count


def test_steps_that_end_keep_it_quiet_however_slow_they_are() -> None:
    told: list[str] = []
    with Watchdog(told.append, quiet_seconds=0.3) as watchdog:
        for _ in range(8):
            watchdog.beat(0.1)
            time.sleep(0.1)
        watchdog.beat(1.0)  # twenty of them are longer than the quiet time
        time.sleep(0.6)
    assert told == []
