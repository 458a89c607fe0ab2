"""What a run leaves for people and for other programs: JUnit, Markdown, one HTML file, a badge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_hal_conformance.report.badge import badge_text
from qlora_hal_conformance.report.html import html_text
from qlora_hal_conformance.report.junit import junit_text
from qlora_hal_conformance.report.markdown import markdown_text
from qlora_hal_conformance.verdicts import CaseResult

__all__ = ["badge_text", "html_text", "junit_text", "markdown_text", "write_reports"]


def write_reports(folder: Path, document: Mapping[str, object], results: Sequence[CaseResult]) -> None:
    """Every report of one run; a filtered run gets no badge."""
    (folder / "junit.xml").write_text(junit_text(document, results), encoding="utf-8")
    (folder / "matrix.md").write_text(markdown_text(document, results), encoding="utf-8")
    (folder / "report.html").write_text(html_text(document, results), encoding="utf-8")
    if not document.get("filtered"):
        (folder / "badge.json").write_text(badge_text(document), encoding="utf-8")
