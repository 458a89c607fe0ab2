"""JUnit XML. A refused case is passed there; inconclusive and waived ones are failures, since nothing else is red."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence

from qlora_hal_conformance.catalogue import section_of
from qlora_hal_conformance.verdicts import CaseResult


def junit_text(document: Mapping[str, object], results: Sequence[CaseResult]) -> str:
    """One suite for the run, one test case to a case."""
    backend = document.get("backend")
    name = str(backend.get("name")) if isinstance(backend, dict) else ""
    red = sum(not result.verdict.is_green for result in results)
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=f"qlora_hal conformance of {name}",
        tests=str(len(results)),
        failures=str(red),
        errors="0",
        skipped="0",
        time=f"{sum(result.seconds for result in results):.3f}",
        timestamp=str(document.get("started", "")),
    )
    for result in results:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=section_of(result.case),
            name=result.case.partition("/")[2],
            time=f"{result.seconds:.3f}",
        )
        if not result.verdict.is_green:
            ElementTree.SubElement(case, "failure", type=result.verdict.value, message=_clean(result.message))
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(_figures(result))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _figures(result: CaseResult) -> str:
    tightest = result.tightest
    if tightest is None:
        return result.verdict.value
    return f"{result.verdict.value}: {tightest.what}: {tightest.measured:.3g} of {tightest.bound:.3g}"


def _clean(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(letter if letter >= " " or letter in "\t\n" else "?" for letter in text)
