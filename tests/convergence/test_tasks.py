"""The tasks: the same rows each time, nothing held out is trained, and a seed decides the order."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.values import IGNORE_LABEL
from qlora_hal.demo import model_path
from qlora_hal_conformance.convergence.tasks import TASKS, tokenized
from qlora_hal_conformance.convergence.training import Plan, Settings

SETTINGS = Settings(steps=3, learning_rate=1e-3)


def plan_of(name: str) -> Plan:
    return Plan(tokenized(TASKS[name](), model_path()), SETTINGS)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_the_same_each_time(name: str) -> None:
    assert TASKS[name]() == TASKS[name]()
    assert plan_of(name).sha256() == plan_of(name).sha256()


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_row_is_trained(name: str) -> None:
    task = TASKS[name]()
    assert not set(task.held_out) & set(task.trained)
    assert not {row.answer for row in task.held_out} & {row.answer for row in task.trained} or name == "answers"
    assert len(plan_of(name).task.held_out) >= 60


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_the_order_and_no_row_comes_twice(name: str) -> None:
    plan = plan_of(name)
    first, again, other = plan.windows(0), plan.windows(0), plan.windows(1)
    assert all(
        np.array_equal(one.input_ids, two.input_ids)
        for left, right in zip(first, again, strict=True)
        for one, two in zip(left, right, strict=True)
    )
    assert not np.array_equal(first[0][0].input_ids[:, :8], other[0][0].input_ids[:, :8])
    rows = [
        bytes(row[segment != 0])
        for w in first
        for b in w
        for row, segment in zip(b.input_ids, b.segment_ids, strict=True)
    ]
    assert len(rows) == len(set(rows)) == SETTINGS.steps * SETTINGS.rows * SETTINGS.micro_batches


@pytest.mark.parametrize("name", TASKS)
def test_only_the_answer_and_its_end_are_counted(name: str) -> None:
    plan = plan_of(name)
    for window in plan.windows(0):
        for batch in window:
            counted = batch.labels != IGNORE_LABEL
            assert not counted[:, 0].any()
            assert np.array_equal(batch.labels[counted], batch.input_ids[counted])
            assert not counted[batch.segment_ids == 0].any()
        assert np.array_equal(np.concatenate([b.rows for b in window if b.rows is not None]), np.arange(8))


def test_too_many_steps_for_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows, and the task has"):
        Plan(plan_of("records").task, Settings(steps=1000, learning_rate=1e-3)).windows(0)
