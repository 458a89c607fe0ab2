"""Every row of the fault catalogue is shown by a test, or says here why none can."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_hal.errors.fault_catalogue import faults

TESTS = Path(__file__).resolve().parent

NOT_SHOWN = {
    "S20": "one thread saves; a signal is only looked at between steps",
    "S23": "what a kill in the middle of a save leaves is shown by S01 to S07",
    "S28": "states that nothing is saved in the background",
    "S55": "needs a file system without locks",
    "N11": "a property of each backend: the suite shows the products in every compute dtype",
    "D17": "needs a hub that answers; E11 shows the way without one",
    "C80": "needs an adapter that overflows and whose tensors are finite",
    "E16": "needs a GPU that others use",
    "E17": "states what is not looked for",
    "X08": "states what is not read",
    "X09": "states that nothing is opened",
    "X12": "states that nothing listens",
    "X14": "states that nothing is unpacked",
    "U50": "needs an environment without pytest, in which no test runs",
}
"""Row -> why there is no test that shows it."""


def shown_rows() -> set[str]:
    """Rows that a test carries as a mark, or whose code it expects."""
    shown: set[str] = set()
    for file in TESTS.rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        marks = " ".join(re.findall(r"mark\.fault\(([^)]*)\)", text))
        shown |= {*re.findall(r'"([A-Z]\d\d)"', marks), *re.findall(r"QH-([A-Z]\d\d)", text)}
    return shown


def rows() -> set[str]:
    return {code.removeprefix("QH-") for code in faults()}


def test_every_row_is_shown_or_says_why_not() -> None:
    assert rows() - shown_rows() == NOT_SHOWN.keys()


def test_shown_rows_are_rows_of_the_catalogue() -> None:
    marked = set()
    for file in TESTS.rglob("test_*.py"):
        marks = " ".join(re.findall(r"mark\.fault\(([^)]*)\)", file.read_text(encoding="utf-8")))
        marked |= set(re.findall(r'"([A-Z]\d\d)"', marks))
    assert marked <= rows()
