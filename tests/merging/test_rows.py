"""Rows to compare on, and rows to calibrate on: never the same ones while there are others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import data_path, model_path
from qlora_hal.export.request import MergeRequest
from qlora_hal.export.rows import HeldOutRows, held_out_rows
from qlora_hal.export.subject import read_subject
from qlora_hal.model.facts import read_facts

MakeTrained = Callable[..., Any]


def rows_for(target: Path, out: Path, **choices: Any) -> HeldOutRows:
    request = MergeRequest(target=target, out=out, **choices)
    return held_out_rows(
        request, read_subject(request), ChatTokenizer.from_folder(model_path()), read_facts(model_path())
    )


def numbers(rows: HeldOutRows) -> tuple[list[int], list[int]]:
    """Row numbers of the file: (compared, calibrated on)."""
    return rows.store.row_numbers.tolist(), rows.calibration.row_numbers.tolist()


@pytest.mark.parametrize(
    ("limit", "compared", "calibrated"),
    [(5, [1, 2, 3, 4, 5], [6, 7, 8]), (8, list(range(1, 9)), list(range(1, 9)))],
    ids=["some are left", "none is left"],
)
def test_rows_named_that_are_not_compared_are_for_calibration(
    trained: MakeTrained, tmp_path: Path, limit: int, compared: list[int], calibrated: list[int]
) -> None:
    one = trained("nf4")
    found = rows_for(one.folder, tmp_path / "merged", rows=str(one.rows), row_limit=limit)
    assert numbers(found) == (compared, calibrated)
    assert len(found.others) == 8 - limit


def test_a_run_is_calibrated_on_training_rows_that_are_not_compared(tmp_path: Path) -> None:
    lines = data_path("train").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:24]))
    (tmp_path / "validation.jsonl").write_text("".join(lines[24:30]))
    data = {"data.path": str(tmp_path / "train.jsonl"), "data.truncation": "right", "training.max_steps": 2}
    without = small_run(tmp_path / "without", data)
    held_out = small_run(tmp_path / "with", {**data, "data.validation_path": str(tmp_path / "validation.jsonl")})
    tail = rows_for(without.run_dir, tmp_path / "merged", row_limit=4)
    assert (tail.kind, *numbers(tail)) == ("training tail", [21, 22, 23, 24], list(range(1, 21)))
    validation = rows_for(held_out.run_dir, tmp_path / "merged", row_limit=4)
    assert (validation.kind, *numbers(validation)) == ("validation", [1, 2, 3, 4], list(range(1, 25)))
