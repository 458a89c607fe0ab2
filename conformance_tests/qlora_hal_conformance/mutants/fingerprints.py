"""The book of fingerprints: which cases each mutant turns red. A red run of any backend is compared with it.

python -m qlora_hal_conformance.mutants --fingerprints [--only NAME ... | --missing]

Each entry says the revision of the suite that it was put to; one of an earlier revision counts as missing, for its
cases are others. Entries of mutants that are not named stay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_hal.files.replacing import replace_file
from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.localisation import FINGERPRINTS, plain_name
from qlora_hal_conformance.verdicts import Verdict

from .registry import Mutant
from .run_mutants import run

SECTIONS = ("30", "31", "40", "41", "43", "50")
"""Where numbers of a training run are wrong; weights (20) are told by facts, and the rest by its cases' own words."""
ONE_FORMAT = (
    "not none and not int8 and not fp4 and not fp8 and not affine and not gptq and not float16"
    " and not long_rows and not deep_model and not process"
)
"""NF4 in float32 stands for all formats and dtypes: a fingerprint is of cases' names without them."""
NOTHING_RED = "nothing_red"
"""Where the book names the mutants that turn nothing red here: what they do wrong shows in other sections or dtypes."""


def fingerprint(mutant: Mutant, *, seed: int) -> tuple[set[str], set[str]]:
    """(names of red cases, names of all cases) of one mutant."""
    red: set[str] = set()
    judged: set[str] = set()

    def heard(event: Mapping[str, object]) -> None:
        if event["event"] == "ended" and event["verdict"] != Verdict.REFUSED.value:
            name = plain_name(str(event["case"]))
            judged.add(name)
            if not Verdict(str(event["verdict"])).is_green:
                red.add(name)

    spec = f"{__package__}.specs:{mutant.name}"
    run(spec, SECTIONS, heard, seed=seed, case_seconds=mutant.case_seconds, keyword=ONE_FORMAT)
    return red, judged


def write_fingerprints(mutants: Sequence[Mutant], *, seed: int) -> None:
    """Put each of these into the book, which is whole after each."""
    for mutant in mutants:
        started = time.monotonic()
        red, judged = fingerprint(mutant, seed=seed)
        content = json.dumps(with_entry(read_book(), mutant, red, judged), indent=1) + "\n"
        replace_file(FINGERPRINTS, content.encode("utf-8"))
        print(f"{mutant.name:42} {time.monotonic() - started:6.1f} s  {len(red)} red of {len(judged)}", flush=True)


def with_entry(book: Mapping[str, Any], mutant: Mutant, red: set[str], judged: set[str]) -> dict[str, object]:
    """The book with what became of one mutant. One that turned nothing red looks like no red run, and is only noted."""
    entries, quiet = dict(book.get("mutants", {})), dict(book.get(NOTHING_RED, {}))
    entries.pop(mutant.name, None)
    quiet.pop(mutant.name, None)
    if red:
        entries[mutant.name] = {"defect": mutant.defect, "suite": SUITE_VERSION, "red": sorted(red)}
    else:
        quiet[mutant.name] = SUITE_VERSION
    return {
        "judged": sorted({*book.get("judged", []), *judged}),
        NOTHING_RED: dict(sorted(quiet.items())),
        "mutants": dict(sorted(entries.items())),
    }


def missing(mutants: Sequence[Mutant], book: Mapping[str, Any] | None = None) -> list[Mutant]:
    """Those that were not put to this revision of the suite; first the ones that its sections here must catch."""
    given = read_book() if book is None else book
    put = {name: entry.get("suite") for name, entry in given.get("mutants", {}).items()} | given.get(NOTHING_RED, {})
    left = [mutant for mutant in mutants if put.get(mutant.name) != SUITE_VERSION]
    return sorted(left, key=lambda mutant: not set(mutant.caught_by) & set(SECTIONS))


def read_book() -> dict[str, Any]:
    """Empty where there is none yet."""
    book = json.loads(FINGERPRINTS.read_text(encoding="utf-8")) if FINGERPRINTS.is_file() else {}
    assert isinstance(book, dict), FINGERPRINTS
    return book
