"""`python -m qlora_hal_conformance.mutants.generated`: how many of the mutants nobody thought up are caught.

Each is the reference backend with one change of its syntax tree. A run that was broken off goes on from its journal.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from qlora_hal_conformance.mutants.records import stamp, write_record
from qlora_hal_conformance.mutants.table import put_section

from .drawing import drawn, named, not_reached
from .identity import Identity
from .reporting import TITLE, record_of_score, section_of
from .score import Found, HonestCopyFailed, Journal, hunt_changes, measure_reached

PROGRAM = "python -m qlora_hal_conformance.mutants.generated"
LEAST_SCORE = 0.97
ENOUGH, TOO_FEW, HONEST_FAILED = 0, 20, 3


def main(arguments: list[str] | None = None) -> int:
    given = _parse(arguments)
    journal = Journal(given.journal or given.out.with_suffix(".journal"), suite_seed=given.suite_seed)
    try:
        reached_by = measure_reached(journal, suite_seed=given.suite_seed, told=_say)
    except HonestCopyFailed as failed:
        print(f"The copy without a change failed {failed}.", file=sys.stderr)
        return HONEST_FAILED
    chosen = [named(Identity.read(text), reached_by) for text in given.only]
    changes = chosen or list(islice(drawn(given.seed, reached_by), given.number))
    found = hunt_changes(changes, journal, suite_seed=given.suite_seed, jobs=given.jobs, told=_tell)
    score = record_of_score(found)
    _say(f"{score['caught']} of {score['mutants']} caught")
    if not chosen:
        record = {**stamp(_command(given)), **score, "not_reached": not_reached(reached_by)}
        write_record(given.out, record)
        if given.table is not None:
            put_section(given.table, TITLE, section_of(record))
    return ENOUGH if sum(bool(one.caught_by) for one in found) >= LEAST_SCORE * len(found) else TOO_FEW


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--number", type=int, default=300, help="how many are drawn (300)")
    parser.add_argument("--only", nargs="+", default=[], metavar="IDENTITY", help="these alone, and no record")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (1)")
    parser.add_argument("--suite-seed", type=int, default=1, help="of the suite's inputs (1)")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once (2)")
    parser.add_argument("--out", type=Path, default=Path("docs/runs/mutation_score.json"), help="where the record goes")
    parser.add_argument("--table", type=Path, metavar="FILE", help="put a section into this Markdown file")
    parser.add_argument("--journal", type=Path, help="what is done so far; by default beside the record")
    return parser.parse_args(arguments)


def _command(given: argparse.Namespace) -> str:
    return f"{PROGRAM} --number {given.number} --seed {given.seed} --suite-seed {given.suite_seed} --out {given.out}"


def _tell(found: Found) -> None:
    caught = f"{found.caught_by}: {found.reason}" if found.caught_by else f"SURVIVED {found.was} -> {found.becomes}"
    _say(f"{found.mutant:50} {found.seconds:6.1f} s  {caught[:150]}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
