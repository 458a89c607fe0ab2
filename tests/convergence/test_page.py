"""docs/convergence.md shows the records of docs/runs/convergence.json, and they say what the page claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qlora_hal_conformance.mutants.convergence import DEFECTS

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import convergence_table
from benchmarks.convergence_table import documents, table, without_out

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


@pytest.mark.parametrize(
    "out", ["--out a.json", "--out=a.json", "--out '/tmp/a folder/a.json'"], ids=["two words", "one word", "quoted"]
)
@pytest.mark.parametrize("place", range(4))
def test_a_record_is_of_its_command_but_for_the_file_wherever_that_is_named(out: str, place: int) -> None:
    """Options behind the file tell runs apart, too."""
    words = ["python -m qlora_hal_conformance.convergence", "smollm2", "--seeds 3", "--defect 'a b'"]
    told = " ".join([*words[: place + 1], out, *words[place + 1 :]])
    assert without_out(told) == " ".join(words)


def test_collected_records_stand_in_for_those_of_the_same_command_and_others_come_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever file a command was told to write its record to."""
    before = documents()
    kept = tmp_path / "convergence.json"
    kept.write_text(json.dumps({"runs": before}))
    again = {**before[1], "command": f"{before[1]['command']} --out /tmp/again.json", "backend": "measured_again"}
    new = {**before[0], "command": f"{before[0]['command']} --seeds 3 --out new.json", "backend": "another"}
    for name, run in (("again", again), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    monkeypatch.setattr(convergence_table, "RECORD", kept)
    files = [str(tmp_path / f"{name}.json") for name in ("again", "new")]
    for _ in range(2):  # collecting twice is collecting once
        monkeypatch.setattr(sys, "argv", ["convergence_table.py", "--collect", *files])
        convergence_table.main()
    after = json.loads(kept.read_text())["runs"]
    assert after[0] == before[0]
    assert after[1] == {**before[1], "backend": "measured_again"}
    assert after[2:-1] == before[2:]
    assert after[-1] == {**before[0], "command": f"{before[0]['command']} --seeds 3", "backend": "another"}
    said = capsys.readouterr().out
    assert "`measured_again`" in said
    assert "`another`" in said
