"""A table of sections and verdicts, and every case that is not green."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_hal_conformance.catalogue import level_of, section_of
from qlora_hal_conformance.judged_in import judged_in_words
from qlora_hal_conformance.verdicts import CaseResult, Measure, Verdict


def markdown_text(document: Mapping[str, object], results: Sequence[CaseResult]) -> str:
    """The matrix as a page of Markdown."""
    backend = document.get("backend")
    device = document.get("device")
    name = backend.get("name") if isinstance(backend, dict) else ""
    place = device.get("device", "") if isinstance(device, dict) else ""
    state = "conformant" if document.get("conformant") is True else "not conformant"
    if document.get("filtered"):
        state = "filtered run, no certificate"
    lines = [f"# {name}: {state}", "", f"Device: {_cell(str(place))}. Seed {document.get('seed')}.", ""]
    lines += ["| level | section | passed | refused | failed | inconclusive | waived | most used of a bound |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|---|"]
    for section in dict.fromkeys(section_of(result.case) for result in results):
        lines.append(_row(section, [result for result in results if section_of(result.case) == section]))
    lines += _listed("Judged in", judged_in_words(_part(document, "judged_in")))
    lines += _listed("Where it is wrong", _part(document, "localisation").get("lines"))
    red = [result for result in results if not result.verdict.is_green]
    if red:
        lines += ["", "## Not green", "", "| case | verdict | why |", "|---|---|---|"]
        lines += [f"| `{result.case}` | {result.verdict.value} | {_cell(result.message)} |" for result in red]
    return "\n".join(lines) + "\n"


def _listed(title: str, lines: object) -> list[str]:
    texts = [f"- {_cell(str(line))}" for line in lines] if isinstance(lines, list) else []
    return ["", f"## {title}", "", *texts] if texts else []


def _part(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = document.get(key)
    return part if isinstance(part, dict) else {}


def _row(section: str, results: Sequence[CaseResult]) -> str:
    counted = Counter(result.verdict for result in results)
    tightest = max(
        (result.tightest for result in results if result.tightest is not None and result.verdict is Verdict.PASSED),
        key=lambda measure: measure.used,
        default=None,
    )
    numbers = " | ".join(str(counted[verdict]) for verdict in Verdict)
    return f"| {level_of(results[0].case)} | {section} | {numbers} | {_used(tightest)} |"


def _used(tightest: Measure | None) -> str:
    if tightest is None:
        return "nothing measured"
    return f"{100 * tightest.used:.3g} %, {_cell(tightest.what)}" if tightest.used else "exact"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
