"""Waivers: shown, never green, and only while they hold."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_hal.errors import ConfigError
from qlora_hal_conformance import waivers
from qlora_hal_conformance.counting import Count
from qlora_hal_conformance.verdicts import CaseResult, Verdict
from qlora_hal_conformance.waivers import apply_waivers, read_waivers

CASE = "60_memory/reported_peak_does_not_grow"
TEXT = f"""
[[waiver]]
case = "{CASE}"
issue = "https://example.org/toy/issues/7"
expires = 2030-01-31
"""
DAY = datetime.date(2030, 1, 31)


def _with(results: list[CaseResult], verdict: Verdict) -> Count:
    return Count(tuple(replace(r, verdict=verdict) if r.case == CASE else r for r in results))


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    return path


def test_failed_case_is_waived_until_its_last_day(results: list[CaseResult], tmp_path: Path) -> None:
    known = read_waivers(_written(tmp_path, TEXT))
    failed = _with(results, Verdict.FAILED)
    waived = apply_waivers(failed, known, DAY)
    assert waived.totals["waived"] == 1
    assert not waived.all_green
    (shown,) = [result for result in waived.results if result.case == CASE]
    assert shown.waiver == {"issue": "https://example.org/toy/issues/7", "expires": "2030-01-31"}
    assert apply_waivers(failed, known, DAY + datetime.timedelta(days=1)) == failed


def test_example_of_the_module_is_a_waivers_file(tmp_path: Path) -> None:
    _, _, example = str(waivers.__doc__).partition("\n\n")
    assert len(read_waivers(_written(tmp_path, example))) == 1


@pytest.mark.parametrize("verdict", [Verdict.PASSED, Verdict.REFUSED, Verdict.INCONCLUSIVE])
def test_nothing_but_a_failure_is_waived(verdict: Verdict, results: list[CaseResult], tmp_path: Path) -> None:
    given = _with(results, verdict)
    assert apply_waivers(given, read_waivers(_written(tmp_path, TEXT)), DAY) == given


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[waiver", "waivers.toml"),
        ("waiver = 3", "[[waiver]]"),
        ("[[waiver]]\ncase = 'nowhere'\nissue = 'https://a.b/1'\nexpires = 2030-01-01", "no case"),
        (TEXT.replace("https://example.org/toy/issues/7", "soon"), "address"),
        (TEXT.replace("2030-01-31", "'one day'"), "date"),
        (TEXT + "why = 'x'", "unknown key why"),
        ("other = 1\n" + TEXT, "unknown key other"),
    ],
)
def test_mistakes_are_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_waivers(_written(tmp_path, text))
    assert refusal.value.code == "QH-B50"
    assert words in str(refusal.value)
