"""The navigation of the documentation's site. Links are checked where it is built: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MADE_WHILE_BUILDING = {"index.md", "python_reference.md", "hooks.md"}


def test_every_page_stands_in_the_navigation_once() -> None:
    navigation = re.search(r"(?ms)^nav:\n(.*?)^\w", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert navigation is not None
    named = re.findall(r"- (?:[^:\n]+: )?(\S+\.md)$", navigation[1], flags=re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(pages | MADE_WHILE_BUILDING)
