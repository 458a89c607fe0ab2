"""`python -m qlora_hal_conformance.mutants.unseen_hunt`: how many mutants made without sight of the list are caught.

Each runs through the whole suite until a case fails. A run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_hal_conformance.catalogue import all_cases, number_of

from .population import NAMED
from .records import read_record, stamp, write_record
from .registry import Mutant
from .run_mutants import first_failure
from .table import put_section
from .unseen import UNSEEN

PROGRAM = "python -m qlora_hal_conformance.mutants.unseen_hunt"
TITLE = "Mutants thought up without sight of the list"
CAUGHT_ALL, LET_ONE_THROUGH, USAGE = 0, 20, 2

Row = dict[str, object]


def main(arguments: list[str] | None = None) -> int:
    given = _parse(arguments)
    unknown = sorted(set(given.only) - {mutant.name for mutant in UNSEEN})
    if unknown:
        print(f"No unseen mutant is called {', '.join(unknown)}.", file=sys.stderr)
        return USAGE
    mutants = [NAMED[name] for name in given.only] or list(UNSEEN)
    rows = {} if given.only else _known(given.out)

    def one(mutant: Mutant) -> None:
        if mutant.name not in rows:
            rows[mutant.name] = hunt_whole(mutant, seed=given.seed)
            print(f"{mutant.name:42} {rows[mutant.name]['caught_by'] or 'SURVIVED'}", flush=True)
            if not given.only:
                write_record(given.out, record_of(given, [rows[m.name] for m in UNSEEN if m.name in rows]))

    with ThreadPoolExecutor(max_workers=given.jobs) as pool:
        list(pool.map(one, mutants))
    found = [rows[mutant.name] for mutant in mutants]
    survivors = [row for row in found if not row["caught_by"]]
    print(f"{len(found) - len(survivors)} of {len(found)} caught")
    if given.table is not None and not given.only:
        put_section(given.table, TITLE, section_of(record_of(given, found), found))
    return LET_ONE_THROUGH if survivors else CAUGHT_ALL


def hunt_whole(mutant: Mutant, *, seed: int) -> Row:
    """One mutant through the whole suite, to the first case that fails: first the sections about its subject."""
    started, spec = time.monotonic(), f"{__package__}.specs:{mutant.name}"
    others = tuple(sorted({number_of(case) for case in all_cases()} - set(mutant.caught_by)))
    found = first_failure(spec, mutant.caught_by, seed=seed) or first_failure(spec, others, seed=seed)
    case, reason = found or ("", "")
    seconds = round(time.monotonic() - started, 1)
    return {
        "mutant": mutant.name,
        "defect": mutant.defect,
        "caught_by": case,
        "reason": reason[:200],
        "seconds": seconds,
    }


def record_of(given: argparse.Namespace, rows: Sequence[Row]) -> dict[str, object]:
    caught = sum(bool(row["caught_by"]) for row in rows)
    command = f"{PROGRAM} --seed {given.seed} --out {given.out}"
    return {**stamp(command), "mutants": len(rows), "caught": caught, "all": list(rows)}


def section_of(record: Mapping[str, object], rows: Sequence[Row]) -> str:
    """A row for each."""
    lines = [f"The suite caught {record['caught']} of {record['mutants']}. Written by `{record['command']}`.", ""]
    lines += ["| what is wrong | mutant | caught by |", "|---|---|---|"]
    for row in rows:
        caught = f"`{row['caught_by']}`" if row["caught_by"] else "**nothing**"
        lines.append(f"| {row['defect']} | `{row['mutant']}` | {caught} |")
    return "\n".join(lines)


def _known(path: Path) -> dict[str, Row]:
    """What an earlier run of the same suite found."""
    record = read_record(path)
    if record is None or record.get("suite") != stamp("")["suite"]:
        return {}
    rows = record["all"]
    assert isinstance(rows, list)
    return {str(row["mutant"]): row for row in rows}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these alone, and write no record")
    parser.add_argument("--seed", type=int, default=1, help="of the suite's inputs (1)")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once (2)")
    parser.add_argument("--out", type=Path, default=Path("docs/runs/unseen_mutants.json"), help="where the record goes")
    parser.add_argument("--table", type=Path, metavar="FILE", help="put a section into this Markdown file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
