"""In which compute dtypes, and on which families of models, the cases of a run judged: a proof in one dtype says little
of another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_hal_conformance.catalogue import section_of
from qlora_hal_conformance.verdicts import CaseResult, Verdict

_RAN = re.compile(
    r"(?P<format>[^/+ ]+)(?:/(?P<block>\d+))?(?P<double>\+double_quant)? in (?P<dtype>\w+)(?: of (?P<family>\w+))?"
)
FAMILY = "llama"
"""The family of what ran where none is named."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a case ran, as `Opener` notes it."""

    weight_format: str
    block_size: int | None
    double_quant: bool
    dtype: str
    family: str = FAMILY


def read_ran(text: str) -> Ran | None:
    """`nf4/64+double_quant in bfloat16`, with ` of FAMILY` behind it where the model is no Llama; None for any other
    text."""
    found = _RAN.fullmatch(text)
    if found is None:
        return None
    block = found["block"]
    return Ran(
        found["format"], int(block) if block else None, bool(found["double"]), found["dtype"], found["family"] or FAMILY
    )


def judged_in(results: Sequence[CaseResult], auto: str) -> dict[str, object]:
    """`auto` is the dtype that the device takes by itself; `dtypes` and `families` map each name to the number of
    passed cases that ran it and their sections."""
    passed = [result for result in results if result.verdict is Verdict.PASSED]
    return {
        "auto": auto,
        "dtypes": _table(passed, "dtype"),
        "families": _table(passed, "family"),
    }


def judged_in_words(table: Mapping[str, object]) -> list[str]:
    """A line for each dtype, the one that `auto` takes first, and one for the families."""
    auto, dtypes, families = str(table.get("auto", "")), _part(table, "dtypes"), _part(table, "families")
    lines = [
        f"{dtype}{', which auto takes here' if dtype == auto else ''}: {_said(dtypes[dtype])}"
        for dtype in sorted(dtypes, key=lambda dtype: (dtype != auto, dtype))
    ]
    if auto and auto not in dtypes:
        lines.insert(0, f"{auto}, which auto takes here: no case")
    return lines + [f"models of {family}: {_said(row)}" for family, row in sorted(families.items())]


def cases_that_ran(results: Iterable[CaseResult], wanted: Ran) -> list[str]:
    """The passed cases that ran just this."""
    return [r.case for r in results if r.verdict is Verdict.PASSED and wanted in map(read_ran, r.ran)]


def _table(passed: Sequence[CaseResult], key: str) -> dict[str, object]:
    cases: dict[str, list[str]] = {}
    for result in passed:
        for name in sorted({getattr(ran, key) for ran in map(read_ran, result.ran) if ran is not None}):
            cases.setdefault(name, []).append(result.case)
    return {
        name: {"cases": len(chosen), "sections": list(dict.fromkeys(map(section_of, chosen)))}
        for name, chosen in sorted(cases.items())
    }


def _said(row: object) -> str:
    if not isinstance(row, dict):
        return "no case"
    number = row.get("cases")
    return f"{number} case{'' if number == 1 else 's'}, in {', '.join(str(name) for name in row.get('sections', []))}"


def _part(table: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = table.get(key)
    return part if isinstance(part, dict) else {}
