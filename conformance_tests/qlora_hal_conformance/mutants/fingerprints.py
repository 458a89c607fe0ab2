"""The book of fingerprints: which cases each mutant turns red. A red run of any backend is compared with it.

python -m qlora_hal_conformance.mutants --fingerprints [--only NAME ...]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

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
    """Put each of these into the book, written anew after each. A mutant that turns nothing red here is left out."""
    book = json.loads(FINGERPRINTS.read_text(encoding="utf-8")) if FINGERPRINTS.is_file() else {}
    entries, all_judged = dict(book.get("mutants", {})), set(book.get("judged", []))
    for mutant in mutants:
        red, judged = fingerprint(mutant, seed=seed)
        all_judged |= judged
        entries.pop(mutant.name, None)
        if red:
            entries[mutant.name] = {"defect": mutant.defect, "red": sorted(red)}
        content = {"suite": SUITE_VERSION, "judged": sorted(all_judged), "mutants": dict(sorted(entries.items()))}
        FINGERPRINTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{mutant.name:42} {len(red)} red of {len(judged)}", flush=True)
