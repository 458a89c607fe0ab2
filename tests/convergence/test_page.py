"""docs/convergence.md shows the records of docs/runs/convergence.json, and they say what the page claims."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_hal_conformance.mutants.convergence import DEFECTS

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.convergence_table import documents, table

PAGE = (Path(__file__).parents[2] / "docs" / "convergence.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("defects", [False, True])
def test_page_holds_the_table_of_the_records(defects: bool) -> None:
    assert table(documents(), defects=defects) in PAGE


def test_every_defect_was_refused_and_every_honest_run_passed() -> None:
    found = {run["defect"]: run["passes"] for run in documents() if run["defect"] in DEFECTS}
    assert found == dict.fromkeys(DEFECTS, False)
    assert all(run["passes"] for run in documents() if run["defect"] not in DEFECTS)


def test_defects_are_caught_in_both_directions() -> None:
    means = [run["tasks"]["records"]["judgement"]["mean"] for run in documents() if run["defect"] in DEFECTS]
    assert {mean["verdict"] for mean in means} == {"different"}
    assert {mean["found"] > 0 for mean in means} == {True, False}
