"""The report for people: one HTML file that needs nothing else. Every margin is a bar on a logarithmic scale."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qlora_hal_conformance.catalogue import LEVELS, level_of, number_of, section_of
from qlora_hal_conformance.judged_in import judged_in_words
from qlora_hal_conformance.report.style import STYLE
from qlora_hal_conformance.verdicts import CaseResult, Measure, Verdict

DECADES = 8
"""The bar shows measured / bound from 1e-8 (left) to 1 (right, the bound)."""

LEVEL_TITLES = {"L0": "present", "L1": "numbers", "L2": "training", "L3": "state", "L4": "trust"}
SECTION_TITLES = {
    "10": "Detection", "11": "Contract", "20": "Quantization", "30": "Forward pass", "31": "Gradients",
    "35": "All of it together",
    "40": "Optimizer step", "41": "Accumulation", "42": "Loss curve", "43": "Determinism and dropout",
    "44": "Young update", "50": "Checkpoint", "51": "Adapter", "52": "Portability", "60": "Memory", "70": "Errors",
    "80": "Generation", "90": "Faults", "95": "Honesty",
}  # fmt: skip
MARKS = {
    Verdict.PASSED: "✓",
    Verdict.REFUSED: "⊘",
    Verdict.FAILED: "✗",
    Verdict.INCONCLUSIVE: "?",
    Verdict.WAIVED: "⚠",
}


def html_text(document: Mapping[str, object], results: Sequence[CaseResult]) -> str:
    """The whole page."""
    name = _of(document, "backend", "name") or "backend"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)} conformance</title>",
        f"<style>{STYLE}</style></head><body><main>",
        _head(document, results, name),
        "" if "run" in document else _levels(document, results),
        _of_run(document),
        _judged_in(document),
        _located(document),
        _not_green(results),
        _legend(),
        *_sections(results),
        _extra(document),
        _record(document),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# head -----------------------------------------------------------------------------------------------------------------
def _head(document: Mapping[str, object], results: Sequence[CaseResult], name: str) -> str:
    state, tone = _state(document, results)
    counted = Counter(result.verdict for result in results)
    tiles = "".join(
        f'<div class="tile {verdict.value}"><b>{counted[verdict]}</b><span>{verdict.value}</span></div>'
        for verdict in Verdict
        if counted[verdict] or verdict in (Verdict.PASSED, Verdict.FAILED)
    )
    title = _of(document, "backend", "title")
    about = [_of(document, "device", "device"), _flat(_part(document, "device").get("kernel_paths"))]
    facts = " &middot; ".join(escape(text) for text in about if text)
    when = escape(str(document.get("started", "")))
    return (
        f'<header><p class="eyebrow">qlora_hal conformance</p><h1>{escape(name)}</h1>'
        f'<p class="subtitle">{escape(title)}</p><p class="state {tone}">{escape(state)}</p>'
        f'<p class="facts">{facts}</p><p class="facts">{when} &middot; seed {escape(str(document.get("seed")))}'
        f" &middot; {escape(str(document.get('wall_seconds')))} s</p>"
        f'<div class="tiles">{tiles}</div></header>'
    )


def _state(document: Mapping[str, object], results: Sequence[CaseResult]) -> tuple[str, str]:
    if document.get("filtered"):
        return "filtered run: no certificate", "neutral"
    if "run" in document:
        right = document.get("holds") is True
        return f"this run's combination is {'right' if right else 'not right'} here", "good" if right else "bad"
    if document.get("conformant") is True:
        return "conformant", "good"
    only_waived = all(result.verdict.is_green or result.verdict is Verdict.WAIVED for result in results)
    return "not conformant" + (", failures waived" if only_waived else ""), "warn" if only_waived else "bad"


def _levels(document: Mapping[str, object], results: Sequence[CaseResult]) -> str:
    cells = []
    for level in LEVELS:
        of_level = [result for result in results if level_of(result.case) == level]
        green = sum(result.verdict.is_green for result in of_level)
        tone = "neutral" if not of_level else "good" if green == len(of_level) else "bad"
        share = f"<span>{green} / {len(of_level)}</span>"
        cells.append(f'<div class="level {tone}"><b>{level}</b> {LEVEL_TITLES[level]}{share}</div>')
    return f'<div class="levels">{"".join(cells)}</div>'


def _of_run(document: Mapping[str, object]) -> str:
    """What of one run was judged, what was not, and what its certificates say."""
    run, certificates = _part(document, "run"), document.get("certificates")
    if not run:
        return ""
    parts = [("Judged", run.get("judged")), ("Not judged", run.get("not_judged"))]
    for certificate in certificates if isinstance(certificates, list) else []:
        parts.append((f"{certificate.get('file')} says of this run", certificate.get("says")))
    return "".join(f'<section class="said"><h2>{escape(title)}</h2>{_list(lines)}</section>' for title, lines in parts)


def _judged_in(document: Mapping[str, object]) -> str:
    lines = judged_in_words(_part(document, "judged_in"))
    return f'<section class="said"><h2>Judged in</h2>{_list(lines)}</section>' if lines else ""


def _located(document: Mapping[str, object]) -> str:
    lines = _part(document, "localisation").get("lines")
    return f'<section class="said"><h2>Where it is wrong</h2>{_list(lines)}</section>' if lines else ""


def _list(lines: object) -> str:
    texts = [str(line) for line in lines] if isinstance(lines, list) else []
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _not_green(results: Sequence[CaseResult]) -> str:
    red = [result for result in results if not result.verdict.is_green]
    if not red:
        return ""
    items = "".join(
        f'<li><span class="verdict {result.verdict.value}">{result.verdict.value}</span> '
        f"<code>{escape(result.case)}</code>{_waiver(result)}<p>{escape(result.message)}</p></li>"
        for result in red
    )
    return f'<section class="red"><h2>Not green, in the order to work down</h2><ol>{items}</ol></section>'


def _waiver(result: CaseResult) -> str:
    if not result.waiver:
        return ""
    issue = escape(result.waiver.get("issue", ""), quote=True)
    until = escape(result.waiver.get("expires", ""))
    return f' <a href="{issue}" rel="noreferrer">{issue}</a> until {until}'


def _legend() -> str:
    ticks = "".join(
        f'<span style="left:{100 * decade / DECADES:.1f}%">{_tick(decade)}</span>'
        for decade in range(0, DECADES + 1, 2)
    )
    return (
        '<section class="legend"><p>Each bar is the largest measured error of a case as a part of its bound, on a '
        "logarithmic scale: short bars are far from the bound, a bar that reaches the line uses all of it. "
        "<i>exact</i> is equal bit for bit. Point at a bar for the formula. The cases of one test stand "
        "in one row, with the figures of the tightest; results.json has those of each.</p>"
        f'<div class="axis">{ticks}</div></section>'
    )


def _tick(decade: int) -> str:
    return "bound" if decade == DECADES else f"10<sup>-{DECADES - decade}</sup>"


# cases ----------------------------------------------------------------------------------------------------------------
def _sections(results: Sequence[CaseResult]) -> Iterable[str]:
    for section in dict.fromkeys(section_of(result.case) for result in results):
        chosen = [result for result in results if section_of(result.case) == section]
        yield _section(section, chosen)


def _section(section: str, results: Sequence[CaseResult]) -> str:
    green = sum(result.verdict.is_green for result in results)
    tone = "good" if green == len(results) else "bad"
    seconds = sum(result.seconds for result in results)
    rows = "".join(_rows(results))
    title = SECTION_TITLES.get(number_of(section), section)
    is_open = "" if tone == "good" and len(results) > 30 else " open"
    return (
        f'<details class="cases"{is_open}><summary><span class="number">{escape(number_of(section))}</span> '
        f'{escape(title)} <span class="count {tone}">{green} / {len(results)}</span>'
        f'<span class="time">{seconds:.1f} s</span></summary>{_table(rows)}</details>'
    )


def _table(rows: str) -> str:
    head = "<thead><tr><th>cases</th><th>measured</th><th>bound</th><th>used of the bound</th></tr></thead>"
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def _rows(results: Sequence[CaseResult]) -> Iterable[str]:
    """One row for all cases of a test that ended alike: its parameters are listed, and the tightest figures shown. What
    is not green keeps a row for each message."""
    alike: dict[tuple[str, Verdict, str], list[CaseResult]] = {}
    for result in results:
        told = "" if result.verdict.is_green else result.message
        alike.setdefault((_test_of(result), result.verdict, told), []).append(result)
    return (_row(name, cases) for (name, _, _), cases in alike.items())


def _test_of(result: CaseResult) -> str:
    return result.case.partition("/")[2].partition("[")[0]


def _row(name: str, cases: Sequence[CaseResult]) -> str:
    """Without the end tags that HTML does not ask for: there are hundreds of rows, and a page is to be light."""
    mark = f'<i class="{cases[0].verdict.value}">{MARKS[cases[0].verdict]}</i>'
    given = " · ".join(escape(parameters) for case in cases if (parameters := _parameters_of(case)))
    parts = [f"{mark}<code>{escape(name)}</code>", f"<small>{given}</small>" if given else ""]
    parts.append(f"<p>{escape(_why(cases))}</p>" if _why(cases) else "")
    measured = max((case for case in cases if case.tightest), key=lambda case: _order(case.tightest), default=None)
    figures = "<td colspan=3>" if measured is None else _figures(measured, several=len(cases) > 1)
    return f"<tr><td>{''.join(parts)}{figures}"


_OF_A_REFUSAL = re.compile(r"^Backend \S+ does not support what was requested: ")
"""What a refused row says by its mark, on a page of one backend."""


def _why(cases: Sequence[CaseResult]) -> str:
    said = (_OF_A_REFUSAL.sub("", case.message) for case in cases if case.message)
    first, *others = dict.fromkeys(said) or [""]
    return f"{first} And {len(others)} like it." if others else first


def _parameters_of(result: CaseResult) -> str:
    return result.case.partition("[")[2].removesuffix("]")


def _order(measure: Measure | None) -> tuple[bool, float]:
    """The tightest last; what is not a number at all holds no bound."""
    assert measure is not None
    return (not measure.holds, measure.used if math.isfinite(measure.used) else math.inf)


def _figures(result: CaseResult, *, several: bool) -> str:
    tightest = result.tightest
    assert tightest is not None
    where = f"{_parameters_of(result)}: " if several else ""
    figures = (_number(tightest.measured), _number(tightest.bound), _bar(tightest, where))
    return "".join(f"<td>{figure}" for figure in figures)


def _bar(measure: Measure, where: str) -> str:
    hint = escape(f"{where}{measure.what}, at most {measure.formula}", quote=True)
    if measure.used <= 0.0:
        return f'<em title="{hint}">exact</em>'
    width = _width(measure.used)
    tone = "over" if not measure.holds else "near" if measure.used > 0.5 else "within"
    share = "over" if not measure.holds else f"{100 * measure.used:.3g} %"
    return f'<b title="{hint}"><i class="{tone}" style="width:{width:.1f}%"></i></b>{share}'


def _width(used: float) -> float:
    """Per cent of the bar's length: 100 at the bound, 0 at 1e-8 of it."""
    if not math.isfinite(used) or used >= 1.0:
        return 100.0
    return max(100.0 * (1.0 + math.log10(used) / DECADES), 1.0)


def _number(value: float) -> str:
    if value == 0.0:
        return "0"
    return escape(f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1e5 else f"{value:.4g}")


# the rest -------------------------------------------------------------------------------------------------------------
def _extra(document: Mapping[str, object]) -> str:
    from qlora_hal_conformance.journal import result_from_json

    records = document.get("extra_cases")
    if not isinstance(records, list) or not records:
        return ""
    rows = "".join(_rows([result_from_json(record) for record in records]))
    return f'<details class="cases" open><summary>Sections of plugins, not counted</summary>{_table(rows)}</details>'


def _record(document: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in _record_rows(document) if value
    )
    return f'<details class="record"><summary>Record</summary><table><tbody>{rows}</tbody></table></details>'


def _record_rows(document: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    yield "backend", f"{_of(document, 'backend', 'name')} ({_of(document, 'backend', 'trainer')})"
    yield (
        "distribution",
        f"{_of(document, 'backend', 'distribution')} {_of(document, 'backend', 'distribution_version')}",
    )
    yield "contract", str(document.get("contract", ""))
    yield "suite", f"version {_of(document, 'suite', 'version')}, sha256 {_of(document, 'suite', 'sha256')}"
    for part in ("device", "machine"):
        for key, value in _part(document, part).items():
            yield f"{part}: {key}", _flat(value)
    capabilities = _part(document, "backend").get("capabilities")
    for key, value in (capabilities if isinstance(capabilities, dict) else {}).items():
        yield f"declared: {key}", _flat(value)
    ran = document.get("ran")
    yield "formats and dtypes run", _flat(ran)
    yield "certificate sha256", str(document.get("sha256", "none: filtered run"))


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value)
    return "" if value is None else str(value)


def _part(document: Mapping[str, object], part: str) -> Mapping[str, object]:
    section = document.get(part)
    return section if isinstance(section, dict) else {}


def _of(document: Mapping[str, object], part: str, key: str) -> str:
    value = _part(document, part).get(key)
    return "" if value is None else str(value)
