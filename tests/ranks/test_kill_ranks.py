"""The count of kills counts: a bit that differs, a run that is lost, a record of something else."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kill_ranks import STEPS, differing_bits, draw, read_record, summed_up

ROOT = Path(__file__).parents[2]


def test_every_bit_that_differs_is_counted_and_a_lost_tensor_whole() -> None:
    one = {"a": np.array([1.0, 2.0], np.float32), "b": np.zeros(3, np.float32)}
    assert differing_bits(one, {name: tensor.copy() for name, tensor in one.items()}) == 0
    assert differing_bits(one, {**one, "b": np.array([0.0, -0.0, 0.0], np.float32)}) == 1
    assert differing_bits(one, {"a": one["a"]}) == 32 * 5


def test_a_case_is_a_function_of_its_number_and_kills_each_rank_before_and_in_steps() -> None:
    drawn = [draw(random.Random(f"0/{number}"), 2, 10.0) for number in range(60)]
    assert drawn == [draw(random.Random(f"0/{number}"), 2, 10.0) for number in range(60)]
    assert {each["rank"] for each in drawn} == {0, 1}
    assert all(0 <= each.get("after_start_s", 0) <= 10 for each in drawn)
    assert all(1 <= each.get("step", 1) < STEPS for each in drawn)
    assert {"step" in each for each in drawn} == {True, False}


def test_a_record_goes_on_and_is_never_mixed_with_another(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    assert read_record(file, {"ranks": 2}) == []
    file.write_text(file.read_text() + json.dumps({"case": 0}) + "\n")
    assert read_record(file, {"ranks": 2}) == [{"case": 0}]
    with pytest.raises(SystemExit, match="name another file"):
        read_record(file, {"ranks": 3})


def test_the_status_tells_of_anything_that_was_lost_or_differs() -> None:
    equal = {"killed": True, "verdict": "equal", "differing_bits": 0}
    assert summed_up([equal]) == 0
    assert summed_up([equal, {"killed": True, "verdict": "lost"}]) == 1
    assert summed_up([equal, {"killed": True, "verdict": "differs", "differing_bits": 1}]) == 1


def test_the_kept_record_has_no_lost_run_and_no_differing_bit() -> None:
    head, *cases = [json.loads(line) for line in (ROOT / "docs/runs/kills_ranks_cpu.jsonl").read_text().splitlines()]
    assert head["ranks"] == 2
    assert sum(case["killed"] for case in cases) >= 20
    assert {case["verdict"] for case in cases} == {"equal"}
