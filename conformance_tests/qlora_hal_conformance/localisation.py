"""Where a red run is wrong: what is still right, by measured facts, and which known mutants look like it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qlora_hal.formats.catalogue import names
from qlora_hal_conformance.catalogue import HERE, level_of
from qlora_hal_conformance.facts import Fact
from qlora_hal_conformance.journal import Journal
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.running import run_cases
from qlora_hal_conformance.verdicts import CaseResult, Verdict
from qlora_hal_oracle import UNIT_ROUNDOFF

LOCATING_FOLDER = HERE / "sections_that_locate"
FINGERPRINTS = HERE / "mutants" / "fingerprints.json"
"""Which cases each mutant turns red; written by `python -m qlora_hal_conformance.mutants --fingerprints`."""
MOST_NAMED, LEAST_ALIKE = 3, 0.3
NUMBERS = ("L1", "L2", "L3")
_OF_STORAGE = frozenset({*names(), *UNIT_ROUNDOFF, "double"})


@dataclass(frozen=True, slots=True)
class Likely:
    """A mutant whose red cases are about those of a run. `alike` is 1 where they are the same."""

    mutant: str
    defect: str
    alike: float

    def in_words(self) -> str:
        return f"as {self.mutant} ({100 * self.alike:.0f} % alike): {self.defect}"


@dataclass(frozen=True, slots=True)
class Localisation:
    """`facts` with what is wrong first, `likely` with the most alike first, `telling` red cases with those first that
    the fewest mutants turn red."""

    facts: tuple[Fact, ...]
    likely: tuple[Likely, ...]
    telling: tuple[CaseResult, ...]

    def lines(self) -> list[str]:
        """For people: what is wrong, what is right, which case tells most, what it looks like."""
        wrong = [fact.in_words() for fact in self.facts if not fact.is_right]
        right = [fact.what for fact in self.facts if fact.is_right]
        lines = [f"wrong: {words}" for words in wrong]
        if right:
            lines.append(f"still right: {'; '.join(right)}")
        lines += [f"most telling case: {result.case}" for result in self.telling[:1]]
        lines += [f"looks {likely.in_words()}" for likely in self.likely]
        return lines

    def as_json(self) -> dict[str, object]:
        return {
            "lines": self.lines(),
            "facts": [fact.as_json() for fact in self.facts],
            "likely": [
                {"mutant": each.mutant, "defect": each.defect, "alike": round(each.alike, 3)} for each in self.likely
            ],
            "telling": [result.case for result in self.telling],
        }


def localised(request: Request, results: Sequence[CaseResult]) -> Localisation | None:
    """Look at the backend once more where numbers were wrong; None where none were, or nothing could be found out."""
    red = [result for result in results if not result.verdict.is_green]
    if not any(_is_of_numbers(result) for result in red):
        return None
    return Localisation(_grouped(_looked_at(request)), likely_mutants(results), tuple(most_telling_first(red)))


def likely_mutants(results: Sequence[CaseResult], known: Mapping[str, object] | None = None) -> tuple[Likely, ...]:
    """The mutants whose red cases are most like these, over the cases that both were put to.

    A case that few mutants turn red says more than one that all do, so each case weighs 1 / (mutants it is red for).
    """
    red_of, defects, judged = _opened_book(fingerprints() if known is None else known)
    both = judged & {plain_name(result.case) for result in results if result.verdict is not Verdict.REFUSED}
    red = {plain_name(result.case) for result in results if not result.verdict.is_green} & both
    weights = _weights(red_of)
    found = []
    for name, cases in red_of.items():
        of_mutant = cases & both
        union = sum(weights.get(case, 1.0) for case in red | of_mutant)
        alike = sum(weights.get(case, 1.0) for case in red & of_mutant) / union if union else 0.0
        if alike >= LEAST_ALIKE:
            found.append(Likely(name, defects[name], alike))
    return tuple(sorted(found, key=lambda likely: -likely.alike)[:MOST_NAMED])


def most_telling_first(red: Sequence[CaseResult], known: Mapping[str, object] | None = None) -> list[CaseResult]:
    """Red cases by how few mutants turn them red; those that no mutant does, and the rest of equals, as they ran."""
    weights = _weights(_opened_book(fingerprints() if known is None else known)[0])
    return sorted(red, key=lambda result: -weights.get(plain_name(result.case), 0.0))


def plain_name(case: str) -> str:
    """A case without the formats, dtypes and sizes of its parameters: what a mutant does wrong, it does in most."""
    name, _, parameters = case.removesuffix("]").partition("[")
    kept = [part for part in parameters.split("-") if part and part not in _OF_STORAGE and not part.isdigit()]
    return f"{name}[{'-'.join(kept)}]" if kept else name


@cache
def fingerprints() -> Mapping[str, object]:
    """The book of all mutants' red cases; empty where there is none."""
    if not FINGERPRINTS.is_file():
        return {}
    book = json.loads(FINGERPRINTS.read_text(encoding="utf-8"))
    return book if isinstance(book, dict) else {}


def _opened_book(book: Mapping[str, object]) -> tuple[dict[str, set[str]], dict[str, str], set[str]]:
    """Red cases by mutant, defects by mutant, and all cases that the mutants were put to."""
    mutants, judged = book.get("mutants", {}), book.get("judged", [])
    assert isinstance(mutants, dict)
    assert isinstance(judged, list)
    red = {str(name): set(map(str, entry["red"])) for name, entry in mutants.items()}
    return red, {str(name): str(entry["defect"]) for name, entry in mutants.items()}, set(map(str, judged))


def _weights(red_of: Mapping[str, set[str]]) -> dict[str, float]:
    return {case: 1.0 / number for case, number in Counter(case for red in red_of.values() for case in red).items()}


def _is_of_numbers(result: CaseResult) -> bool:
    """A comparison that was over its bound; a crash or a wrong error says where it is by itself."""
    over = any(not measure.holds for measure in result.measures)
    return over and result.verdict is Verdict.FAILED and (level_of(result.case) or "L1") in NUMBERS


def _looked_at(request: Request) -> list[Fact]:
    folder = Path(request.folder) / "located"
    folder.mkdir(exist_ok=True)
    locating = replace(request, folder=str(folder), extra=True, done=(), keyword="")
    run_cases(locating, lambda event: None, sections=(LOCATING_FOLDER,))
    events = Journal(locating.journal_path).read()
    return [Fact.from_json(event) for event in events if event["event"] == "fact"]


def _grouped(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """What is wrong first. Facts about kinds of modules are told one by one only where not all are alike."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(_group(fact.what), []).append(fact)
    told: list[Fact] = []
    for group, members in groups.items():
        if len(members) > 1 and all(fact.is_right for fact in members):
            told.append(replace(members[-1], what=group))
        elif len(members) > 1 and not any(fact.is_right for fact in members):
            whole = next((fact for fact in members if fact.what == group), members[0])
            told.append(replace(whole, what=group))
        else:
            told += members
    return tuple(sorted(told, key=lambda fact: fact.is_right))


def _group(what: str) -> str:
    return what.partition(", ")[0].partition(" of ")[0] if what.startswith("stored") else what.partition(", ")[0]
