"""What a run leaves for people and programs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import pytest
from conformance.conftest import certificate_of

from qlora_hal_conformance.catalogue import section_of
from qlora_hal_conformance.report import write_reports
from qlora_hal_conformance.report.badge import badge_text
from qlora_hal_conformance.verdicts import CaseResult, Measure, Verdict

HOSTILE = "<script>alert(1)</script> & \x00 | \"quoted\" 'it'"


@pytest.fixture
def mixed(results: list[CaseResult]) -> list[CaseResult]:
    """Every verdict, a message that means harm, and measures of every kind."""
    results[0] = replace(results[0], verdict=Verdict.FAILED, message=HOSTILE)
    results[1] = replace(results[1], verdict=Verdict.INCONCLUSIVE, message="not run")
    results[2] = replace(results[2], verdict=Verdict.WAIVED, waiver={"issue": "https://a.b/1", "expires": "2030-01-01"})
    results[3] = replace(results[3], verdict=Verdict.REFUSED, message="has none", measures=())
    odd = (Measure("nan", float("nan"), 1.0, "one"), Measure("infinity", float("inf"), 0.0, "equal"))
    results[4] = replace(results[4], verdict=Verdict.FAILED, measures=odd)
    results[5] = replace(results[5], measures=(Measure("exact", 0.0, 0.0, "equal"),))
    results[6] = replace(results[6], measures=(Measure("nearly", 0.99, 1.0, "one"),))
    return results


def test_every_report_is_written_and_shows_every_case(mixed: list[CaseResult], tmp_path: Path) -> None:
    write_reports(tmp_path, certificate_of(mixed), mixed)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [
        case for case in (r.case.partition("/")[2].removesuffix("]") for r in mixed) if not _shown(case, page)
    ] == []
    assert json.loads((tmp_path / "badge.json").read_text())["schemaVersion"] == 1
    assert "| case | verdict | why |" in (tmp_path / "matrix.md").read_text(encoding="utf-8")


def _shown(case: str, page: str) -> bool:
    test, _, parameters = case.partition("[")
    rows = [row for row in page.split("<tr>") if f"<code>{test}</code>" in row]
    return any(not parameters or re.search(rf"[> ]{re.escape(parameters)}[< ]", row) for row in rows)


def test_cases_that_ended_alike_share_a_row_with_the_tightest_figures(
    results: list[CaseResult], tmp_path: Path
) -> None:
    several = [n for n, result in enumerate(results) if result.case.startswith("30_forward/logits_equal_the_oracle[")][
        :3
    ]
    assert len(several) == 3
    for place, measured in zip(several, (0.1, 0.7, 0.2), strict=True):
        results[place] = replace(results[place], measures=(Measure("logits", measured, 1.0, "one"),))
    write_reports(tmp_path, certificate_of(results), results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (row,) = (row for row in page.split("<tr>") if "<code>logits_equal_the_oracle</code>" in row)
    tightest = results[several[1]].case.partition("[")[2].removesuffix("]")
    assert f'title="{tightest}: logits, at most one"' in row
    assert "70 %" in row


def test_refusals_of_a_test_share_a_row_and_failures_keep_their_own(results: list[CaseResult], tmp_path: Path) -> None:
    several = [n for n, result in enumerate(results) if result.case.startswith("30_forward/logits_equal_the_oracle[")][
        :4
    ]
    verdicts = (Verdict.REFUSED, Verdict.REFUSED, Verdict.FAILED, Verdict.FAILED)
    for number, (place, verdict) in enumerate(zip(several, verdicts, strict=True)):
        results[place] = replace(results[place], verdict=verdict, message=f"why {number}", measures=())
    write_reports(tmp_path, certificate_of(results), results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    whys = [
        re.findall(r"<p>(.*?)</p>", row) for row in page.split("<tr>") if "<code>logits_equal_the_oracle</code>" in row
    ]
    assert sorted(why for row in whys for why in row) == ["why 0 And 1 like it.", "why 2", "why 3"]


def test_page_of_every_case_stays_below_150_kilobytes(results: list[CaseResult], tmp_path: Path) -> None:
    """Of as many cases with figures as refusals, each with words of its own."""
    refused = [
        replace(result, verdict=Verdict.REFUSED, message=f"Backend toy does not support format {n}.", measures=())
        if n % 2
        else replace(
            result, measures=(Measure("error of model.layers.0.mlp", n / 7e3, 1.0, "a formula of some length"),)
        )
        for n, result in enumerate(results)
    ]
    write_reports(tmp_path, certificate_of(refused), refused)
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(mixed: list[CaseResult], tmp_path: Path) -> None:
    write_reports(tmp_path, certificate_of(mixed), mixed)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(src|@import|url\()\s*=?\s*["\']?http', page)
    assert _Balance.unbalanced(page) == []


class _Balance(HTMLParser):
    """Notes every tag that is closed out of order or never. A cell ends with the next one or its row, a row with the
    next one or its body, as HTML has it."""

    _VOID = frozenset({"meta", "wbr", "br"})
    _ENDED_BY = MappingProxyType(
        {"td": frozenset({"td", "th", "tr", "/tr", "/tbody"}), "tr": frozenset({"tr", "/tbody"})}
    )

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_before(tag)
        if tag not in self._VOID:
            self.open.append(tag)

    def _end_before(self, tag: str) -> None:
        while self.open and tag in self._ENDED_BY.get(self.open[-1], ()):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self._end_before(f"/{tag}")
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(f"</{tag}> where {self.open[-1:]} is open, {self.getpos()}")

    @classmethod
    def unbalanced(cls, page: str) -> list[str]:
        parser = cls()
        parser.feed(page)
        return parser.wrong + parser.open


def test_junit_counts_everything_that_is_not_green_as_a_failure(mixed: list[CaseResult], tmp_path: Path) -> None:
    write_reports(tmp_path, certificate_of(mixed), mixed)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert int(suite.attrib["tests"]) == len(mixed) == len(suite)
    assert int(suite.attrib["failures"]) == 4 == len(suite.findall("./testcase/failure"))
    assert suite.attrib["skipped"] == "0"


def test_bars_are_longer_the_more_of_the_bound_is_used() -> None:
    from qlora_hal_conformance.report.html import _width

    used = [1e-9, 1e-6, 1e-3, 0.1, 0.5, 1.0, 50.0, float("inf"), float("nan")]
    widths = [_width(part) for part in used]
    assert widths == sorted(widths)
    assert widths[5:] == [100.0] * 4
    assert _width(1e-4) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("verdict", "color", "words"),
    [
        (Verdict.PASSED, "brightgreen", "L4 + packing"),
        (Verdict.REFUSED, "brightgreen", "L4 + packing"),
        (Verdict.WAIVED, "yellow", "1 waived"),
        (Verdict.FAILED, "red", "1 failed"),
        (Verdict.INCONCLUSIVE, "red", "1 inconclusive"),
    ],
)
def test_badge(verdict: Verdict, color: str, words: str, results: list[CaseResult]) -> None:
    results[7] = replace(results[7], verdict=verdict)
    badge = json.loads(badge_text(certificate_of(results)))
    assert (badge["color"], badge["label"]) == (color, "toy conformance")
    assert words in badge["message"]


def test_table_says_how_much_of_a_bound_was_used_in_plain_figures(results: list[CaseResult], tmp_path: Path) -> None:
    first, *_, last = dict.fromkeys(section_of(result.case) for result in results)
    whole = (Measure("all of it", 0.999, 1.0, "one"),)
    shown = [replace(result, measures=()) if section_of(result.case) == last else result for result in results]
    shown = [replace(result, measures=whole) if section_of(result.case) == first else result for result in shown]
    write_reports(tmp_path, certificate_of(shown), shown)
    lines = (tmp_path / "matrix.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if f"| {first} |" in line)
    assert row.endswith("| 99.9 %, all of it |")
    (row,) = (line for line in lines if f"| {last} |" in line)
    assert row.endswith("| nothing measured |")
    assert "e+0" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_filtered_run_has_no_badge(results: list[CaseResult], tmp_path: Path) -> None:
    write_reports(tmp_path, {**certificate_of(results), "filtered": True}, results)
    assert not (tmp_path / "badge.json").exists()
    assert "no certificate" in (tmp_path / "report.html").read_text(encoding="utf-8")
