"""The catalogue is complete, and its page is the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qlora_hal
from qlora_hal import errors
from qlora_hal.fault_catalogue import AREAS, EXIT_STATUSES, as_markdown, faults, find_fault

ROOT = Path(qlora_hal.__file__).parent.parent
SOURCES = ("qlora_hal", "backends", "conformance_tests")


def codes_in_source() -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for code in re.findall(r"[\"'](QH-[A-Z]\d+)[\"']", file.read_text(encoding="utf-8")):
                found.setdefault(code, str(file.relative_to(ROOT)))
    return found


def test_every_code_raised_in_the_source_has_a_row() -> None:
    absent = {code: place for code, place in codes_in_source().items() if code not in faults()}
    assert absent == {}


def test_rows_are_whole_sentences_with_a_known_exit_status() -> None:
    for fault in faults().values():
        assert re.fullmatch(r"QH-[A-Z]\d\d", fault.code)
        assert fault.area in AREAS
        assert fault.exit_status in EXIT_STATUSES
        assert not fault.title.endswith(".")
        for sentence in (fault.happens, fault.why, fault.do):
            assert sentence.endswith("."), (fault.code, sentence)


def test_every_exit_status_of_the_errors_is_explained() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.QloraHalError)
    ]
    assert {item.exit_status for item in classes} <= set(EXIT_STATUSES)


def test_the_page_is_generated_from_the_catalogue() -> None:
    assert (ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == as_markdown()


@pytest.mark.parametrize("typed", ["QH-D05", "qh-d05", "D05", " d05 "])
def test_a_code_is_found_as_people_type_it(typed: str) -> None:
    fault = find_fault(typed)
    assert fault is not None
    assert fault.code == "QH-D05"


def test_an_unknown_code_is_not_found() -> None:
    assert find_fault("Z00") is None
