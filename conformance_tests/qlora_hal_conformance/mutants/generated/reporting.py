"""The score as a record, and as a section of `docs/mutants.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from qlora_hal_conformance.catalogue import number_of

from .arguments import argument_for
from .score import Found

TITLE = "Mutants that nobody thought up"


def record_of_score(found: Sequence[Found]) -> dict[str, object]:
    """Numbers first, then the survivors with what is to be said of each, then all."""
    survivors = [one for one in found if not one.caught_by]
    caught = len(found) - len(survivors)
    by_section = Counter(number_of(one.caught_by) for one in found if one.caught_by)
    by_operator = {name: list(pair) for name, pair in sorted(_caught_by_operator(found).items())}
    return {
        "mutants": len(found),
        "caught": caught,
        "score": round(caught / len(found), 4) if found else None,
        "first_caught_in_section": dict(sorted(by_section.items())),
        "caught_and_drawn_by_operator": by_operator,
        "survivors": [
            {
                "mutant": one.mutant,
                "within": one.within,
                "was": one.was,
                "becomes": one.becomes,
                "argument": argument_for(one.within, one.was, one.becomes),
            }
            for one in survivors
        ],
        "all": [asdict(one) for one in found],
    }


def _caught_by_operator(found: Sequence[Found]) -> Mapping[str, tuple[int, int]]:
    operators = [(one.mutant.rpartition(":")[2], bool(one.caught_by)) for one in found]
    drawn, caught = (
        Counter(name for name, _ in operators),
        Counter(name for name, was_caught in operators if was_caught),
    )
    return {name: (caught[name], number) for name, number in drawn.items()}


def section_of(record: Mapping[str, object]) -> str:
    """The score in words, and a row for each survivor."""
    survivors = record["survivors"]
    assert isinstance(survivors, list)
    lines = [
        "Each is one change of the syntax tree of the reference backend, or of the modules it computes with: a sign,",
        "a comparison, a constant, an axis, an order of arguments, a call, a branch, a loop. They are drawn evenly",
        "over modules and operators by a seed; changes that no section's honest run reaches, and those that compile to",
        f"equal code, are not drawn. The suite caught {record['caught']} of {record['mutants']}. Written by",
        f"`{record['command']}`.",
        "",
    ]
    if survivors:
        lines += ["What it let through:", "", "| where | was | becomes | what is to be said |", "|---|---|---|---|"]
        lines += [_row(survivor) for survivor in survivors]
    return "\n".join(lines)


def _row(survivor: Mapping[str, str]) -> str:
    module = survivor["mutant"].partition(":")[0]
    cells = (f"{module}, `{survivor['within']}`", f"`{survivor['was']}`", f"`{survivor['becomes']}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, survivor["argument"])) + " |"
