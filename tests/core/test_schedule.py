"""The learning rate at a step, against formulas worked out by hand."""

from __future__ import annotations

import math

import pytest

from qlora_hal.run.lr_schedule import Schedule, warmup_steps


def test_warmup_rises_by_equal_parts_and_wastes_no_step() -> None:
    schedule = Schedule("linear", 1.0, 4, 12)
    assert [schedule.learning_rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_to_one_part_of_what_is_left() -> None:
    schedule = Schedule("linear", 1.0, 2, 12)
    assert schedule.learning_rate(11) == pytest.approx(0.1)
    assert schedule.learning_rate(12) == 0.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    schedule = Schedule("cosine", 2.0, 0, 10)
    assert schedule.learning_rate(5) == pytest.approx(1.0)
    assert schedule.learning_rate(2) == pytest.approx(1.0 + math.cos(0.2 * math.pi))


def test_constant_stays_after_warmup() -> None:
    schedule = Schedule("constant", 3.0, 2, 10)
    assert [schedule.learning_rate(step) for step in (0, 1, 2, 9)] == [1.5, 3.0, 3.0, 3.0]


def test_warmup_is_rounded_up_and_never_longer_than_the_run() -> None:
    assert warmup_steps(100, ratio=0.031, steps=None) == 4
    assert warmup_steps(10, ratio=0.0, steps=40) == 10
