"""The second reading of the journal: what is missing, torn or doubled is not green."""

from __future__ import annotations

from pathlib import Path

from conformance.conftest import passed

from qlora_hal_conformance.counting import count
from qlora_hal_conformance.journal import Journal, result_as_json
from qlora_hal_conformance.verdicts import Verdict

CASES = ["10_detection/a", "10_detection/b", "11_contract/c"]


def _ended(journal: Journal, case: str) -> None:
    journal.write("started", case=case)
    journal.write("ended", **result_as_json(passed(case)))


def test_every_wanted_case_is_counted_once_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for case in reversed(CASES):
        _ended(journal, case)
    counted = count(journal, CASES)
    assert [result.case for result in counted.results] == CASES
    assert counted.all_green


def test_case_without_an_end_or_a_start_is_inconclusive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    _ended(journal, CASES[0])
    journal.write("started", case=CASES[1])
    counted = count(journal, CASES)
    assert [result.verdict for result in counted.results] == [
        Verdict.PASSED,
        Verdict.INCONCLUSIVE,
        Verdict.INCONCLUSIVE,
    ]
    assert "incomplete" in counted.results[1].message
    assert not counted.all_green


def test_empty_journal_is_not_green(tmp_path: Path) -> None:
    counted = count(Journal(tmp_path / "nothing"), CASES)
    assert counted.totals["inconclusive"] == 3
    assert not count(Journal(tmp_path / "nothing"), []).all_green


def test_torn_line_spoils_its_own_case_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    _ended(journal, CASES[0])
    with open(journal.path, "a", encoding="utf-8") as file:
        file.write('{"event": "ended", "case": "10_det')
    _ended(journal, CASES[2])
    assert [result.verdict.is_green for result in count(journal, CASES).results] == [True, False, True]


def test_case_that_ends_twice_or_is_not_listed_is_inconclusive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for case in [*CASES, CASES[0], "99_own/case"]:
        _ended(journal, case)
    counted = count(journal, CASES)
    assert counted.results[0].verdict is Verdict.INCONCLUSIVE
    assert (counted.results[-1].case, counted.results[-1].verdict) == ("99_own/case", Verdict.INCONCLUSIVE)


def test_record_that_cannot_be_read_is_inconclusive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write("ended", case=CASES[0], verdict="splendid")
    journal.write("ended", case=CASES[1], verdict="passed", measures="none")
    assert [result.verdict for result in count(journal, CASES[:2]).results] == [Verdict.INCONCLUSIVE] * 2
