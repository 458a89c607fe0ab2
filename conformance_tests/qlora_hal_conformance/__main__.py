"""`python -m qlora_hal_conformance --backend NAME`: the whole suite against one backend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_hal.cli.streams import output_error, usable_streams
from qlora_hal.errors import QloraHalError
from qlora_hal_conformance.request import DEFAULT_TIMEOUT_SECONDS


def main(argv: Sequence[str] | None = None) -> int:
    """0 only when the backend is conformant, or right for the run of --for; 20 when it is not, 3 when it cannot run
    here; 0 and 20 for --verify."""
    given = _parser().parse_args(argv)
    with usable_streams() as output:
        status = _status(given)
        output.flush()
        if output.problem is None or status != 0 or isinstance(output.problem, BrokenPipeError):
            return status  # a reader that left, as `head` does, has what it wanted
        error = output_error(output.why)
        print(error, file=sys.stderr)
        return error.exit_status


def _status(given: argparse.Namespace) -> int:
    try:
        if given.verify is not None:
            return verify_and_print(given.verify)
        if given.list:
            return print_cases()
        return run_from(given)
    except QloraHalError as error:
        print(error, file=sys.stderr)
        return error.exit_status


def run_from(given: argparse.Namespace) -> int:
    """Run what the parsed flags ask for."""
    from qlora_hal_conformance.conformance_run import Options, run
    from qlora_hal_conformance.for_run import ForOptions, judge_run
    from qlora_hal_conformance.running import lanes_here
    from qlora_hal_conformance.subject import Reference

    lanes = lanes_here() if given.lanes is None else given.lanes
    reference = Reference(given.backend or "", given.trainer or "", given.spec or "")
    is_named = bool(given.backend or given.trainer or given.spec)
    if given.run is not None:
        status, _ = judge_run(
            ForOptions(
                path=given.run,
                reference=reference if is_named else None,
                out=given.out,
                certificate=given.certificate,
                keyword=given.keyword or "",
                seed=given.seed,
                timeout_seconds=given.timeout,
                quiet=given.quiet,
                lanes=lanes,
            )
        )
        return status
    if not is_named:
        _parser().error("name a backend: --backend NAME, or --trainer and --spec for one under development")
    name = reference.backend or (reference.trainer or reference.spec).partition(":")[0]
    options = Options(
        reference=reference,
        out=given.out or Path("conformance") / name,
        seed=given.seed,
        keyword=given.keyword or "",
        sections=tuple(given.section),
        levels=tuple(level.upper() for level in given.level),
        timeout_seconds=given.timeout,
        waivers=given.waivers,
        quiet=given.quiet,
        lanes=lanes,
    )
    return run(options).status


def verify_and_print(path: Path) -> int:
    """Check a certificate and say what does not add up."""
    from qlora_hal_conformance import SUITE_VERSION
    from qlora_hal_conformance.certificate import problems, read_certificate, revision_that_made
    from qlora_hal_conformance.conformance_run import CONFORMANT, NOT_CONFORMANT
    from qlora_hal_conformance.judged_in import judged_in_words
    from qlora_hal_conformance.software import other_versions

    document = read_certificate(path)
    found = problems(document)
    if found:
        print(f"{path}: does not verify", *found, sep="\n  - ")
        return NOT_CONFORMANT
    conformant, revision = document["conformant"] is True, revision_that_made(document)
    state = "conformant" if conformant else "not conformant"
    if revision == SUITE_VERSION:
        print(f"{path}: verifies, {state}")
    else:
        print(f"{path}: verifies: {state} to revision {revision} of the suite; the present one is {SUITE_VERSION}")
    table = document.get("judged_in")
    for line in (*judged_in_words(table if isinstance(table, dict) else {}), *other_versions(document)):
        print(f"  - {line}")
    return CONFORMANT if conformant else NOT_CONFORMANT


def print_cases() -> int:
    """The ids of all cases as the sections have them, in the form of `mustpass/vN.txt`."""
    from qlora_hal_conformance.collecting import collected_cases

    print("\n".join(collected_cases()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_hal_conformance",
        description="Run the conformance suite against one backend. Exit 0 only when it is conformant, else 20.",
    )
    parser.add_argument("--backend", metavar="NAME", help="a listed backend")
    parser.add_argument("--trainer", metavar="MODULE:NAME", help="the trainer of a backend that is not listed")
    parser.add_argument("--spec", metavar="MODULE:SPEC", help="the spec of a backend that is not listed")
    parser.add_argument("--seed", type=int, help="repeat a run; a fresh one is drawn and printed otherwise")
    parser.add_argument("--out", type=Path, help="where the certificate and reports go [conformance/NAME]")
    parser.add_argument(
        "--for",
        dest="run",
        type=Path,
        metavar="RUN",
        help="judge just what this settings file, or the run in this folder, computes; the result lies beside the run",
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="with --for: say what this certificate has to do with the run"
    )
    parser.add_argument("--verify", type=Path, metavar="FILE", help="check a certificate instead of running")
    parser.add_argument("--list", action="store_true", help="print the ids of all cases")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, help="seconds for each case")
    parser.add_argument(
        "--lanes", type=int, metavar="N", help="processes that run cases side by side [one a processor, up to 4]"
    )
    parser.add_argument("--waivers", type=Path, help="known failures [waivers.toml, if it is there]")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    work = parser.add_argument_group("for work; a filtered run never yields a certificate, and its status is 20")
    work.add_argument("-k", dest="keyword", metavar="EXPR", help="only cases whose name matches")
    work.add_argument("--section", action="append", default=[], help="only this section, by number or name")
    work.add_argument("--level", action="append", default=[], help="only this level, L0 to L4")
    return parser


if __name__ == "__main__":
    sys.exit(main())
