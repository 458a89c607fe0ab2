"""`python -m qlora_hal_conformance.mutants`: does the suite catch every wrong backend, and no honest one?"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

from .fingerprints import missing, write_fingerprints
from .population import BY_NAME, MUTANTS
from .run_mutants import Hunt, failures_of_the_honest, hunt_all
from .table import write_table

CAUGHT_ALL, LET_ONE_THROUGH, USAGE = 0, 20, 2


def main(arguments: list[str] | None = None) -> int:
    given = _parse(arguments)
    unknown = sorted(set(given.only) - BY_NAME.keys())
    if unknown:
        print(f"No mutant is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}.", file=sys.stderr)
        return USAGE
    mutants = [BY_NAME[name] for name in given.only] or list(MUTANTS)
    seed = secrets.randbelow(2**31 - 1) + 1 if given.seed is None else given.seed
    if given.fingerprints:
        write_fingerprints(missing(mutants) if given.missing else mutants, seed=seed)
        return CAUGHT_ALL
    started = time.monotonic()
    print(f"{len(mutants)} mutants, seed {seed}", flush=True)
    hunts = {
        found.mutant: found for found in hunt_all(mutants, seed=seed, jobs=given.jobs, full=given.full, told=_tell)
    }
    honest = {} if given.only else failures_of_the_honest(seed=seed)
    for case, reason in honest.items():
        print(f"the honest reference backend failed {case}: {reason}")
    survivors = [found.mutant for found in hunts.values() if found.survived]
    early = [found.mutant for found in hunts.values() if found.too_early]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} caught in {time.monotonic() - started:.0f} s", end="")
    print(f"; survived: {', '.join(survivors)}" if survivors else "")
    if given.out:
        write_table(Path(given.out), MUTANTS, hunts)
    return LET_ONE_THROUGH if survivors or early or honest else CAUGHT_ALL


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qlora_hal_conformance.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these alone")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once (2)")
    parser.add_argument("--seed", type=int, help="the seed of the suite's inputs; drawn when not given")
    parser.add_argument("--full", action="store_true", help="also the sections before, which must not fail")
    parser.add_argument(
        "--fingerprints", action="store_true", help="write down which cases each turns red, for localisation"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="with --fingerprints: only those of which none was written down at this revision of the suite",
    )
    parser.add_argument("--out", metavar="FILE", help="write the table as Markdown; with --only, these rows of it")
    given = parser.parse_args(arguments)
    if given.missing and not given.fingerprints:
        parser.error("--missing is about --fingerprints: name both")
    return given


def _tell(found: Hunt) -> None:
    caught = f"{found.caught_by[0]}: {found.reason}" if found.caught_by else "SURVIVED"
    print(f"{found.mutant:42} {found.seconds:6.1f} s  {caught[:150]}", flush=True)
    for case in found.too_early:
        print(f"{'':42} TOO EARLY  {case}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
