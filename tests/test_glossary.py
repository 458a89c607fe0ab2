"""The glossary names what is there: paths that exist, names that stand in them, in the order of the alphabet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
][2:]


def test_there_are_rows_of_three_cells() -> None:
    assert len(ROWS) > 30
    assert [row for row in ROWS if len(row) != 3] == []


def test_terms_are_sorted_and_stand_once() -> None:
    terms = [row[0].strip("`").casefold() for row in ROWS]
    assert terms == sorted(set(terms))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_place_of_a_term_exists_and_holds_its_name(row: tuple[str, str, str]) -> None:
    term, _, place = row
    paths = re.findall(r"`([^`]+)`", place)
    assert paths, f"{term} names no path"
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    if term.startswith("`"):
        texts = [(ROOT / path).read_text(encoding="utf-8") for path in paths]
        assert any(re.search(rf"\bclass {term.strip('`')}\b", text) for text in texts)
