"""A second reading: the journal counted against the catalogue, case by case.

It knows nothing of how the run went. A case without an end, without a start, or not in the catalogue is not green.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_hal_conformance.catalogue import LEVELS, level_of
from qlora_hal_conformance.journal import Journal, result_from_json
from qlora_hal_conformance.verdicts import CaseResult, Verdict


@dataclass(frozen=True, slots=True)
class Count:
    """Every wanted case once, in the catalogue's order, and how often each verdict was given."""

    results: tuple[CaseResult, ...]

    @property
    def totals(self) -> dict[str, int]:
        counted = Counter(result.verdict for result in self.results)
        return {verdict.value: counted[verdict] for verdict in Verdict}

    @property
    def all_green(self) -> bool:
        return bool(self.results) and all(result.verdict.is_green for result in self.results)

    @property
    def levels(self) -> dict[str, bool]:
        """Whether each level is green throughout; a level without a case is not."""
        return {level: is_green_throughout(self.results, level) for level in LEVELS}


def is_green_throughout(results: Iterable[CaseResult], level: str) -> bool:
    verdicts = [result.verdict for result in results if level_of(result.case) == level]
    return bool(verdicts) and all(verdict.is_green for verdict in verdicts)


def count(journal: Journal, wanted: Sequence[str]) -> Count:
    """One result for each wanted case; a case that the journal has besides is inconclusive and comes last."""
    ended: dict[str, CaseResult] = {}
    started: set[str] = set()
    broke_off = ""
    for event in journal.read():
        if event["event"] == "started":
            started.add(str(event["case"]))
        elif event["event"] == "broke_off":
            broke_off = str(event["how"])
        elif event["event"] == "ended":
            result = _result(event)
            ended[result.case] = _twice(result) if result.case in ended else result
    results = [ended[case] if case in ended else _missing(case, case in started, broke_off) for case in wanted]
    results += [_unlisted(result) for case, result in ended.items() if case not in set(wanted)]
    return Count(tuple(results))


def _result(event: Mapping[str, object]) -> CaseResult:
    try:
        return result_from_json(event)
    except (KeyError, TypeError, ValueError) as error:
        return CaseResult(str(event.get("case", "?")), Verdict.INCONCLUSIVE, f"its record cannot be read: {error}")


def _missing(case: str, was_started: bool, broke_off: str) -> CaseResult:
    reason = "incomplete: started, never ended" if was_started else "not run"
    return CaseResult(case, Verdict.INCONCLUSIVE, f"{reason}; {broke_off}" if broke_off else reason)


def _unlisted(result: CaseResult) -> CaseResult:
    return CaseResult(result.case, Verdict.INCONCLUSIVE, "not a case of the catalogue")


def _twice(result: CaseResult) -> CaseResult:
    return CaseResult(result.case, Verdict.INCONCLUSIVE, "it ended twice")
