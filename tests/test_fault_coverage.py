"""Every row of the fault catalogue that is promised today is shown by at least one test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent

PROMISED = {
    *("S12", "S13", "S14", "C05", "C07", "C08", "C17", "N03", "N04", "N05", "N10", "N13", "N18"),
    *(f"D{number:02}" for number in range(1, 13)),
    *("E01", "E04", "E05", "E06", "E07", "E08", "E11", "E12", "E14"),
}


def shown_rows() -> set[str]:
    marks = re.compile(r"mark\.fault\(([^)]*)\)")
    return {
        row
        for file in TESTS.rglob("test_*.py")
        for arguments in marks.findall(file.read_text())
        for row in re.findall(r'"([A-Z]\d\d)"', arguments)
    }


def test_promised_rows_are_shown() -> None:
    assert not PROMISED - shown_rows()


def test_shown_rows_are_rows_of_the_catalogue() -> None:
    from qlora_hal.fault_catalogue import faults

    assert shown_rows() <= {code.removeprefix("QH-") for code in faults()}
