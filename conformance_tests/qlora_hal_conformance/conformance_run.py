"""A whole run: cases, count, certificate, reports. The command line and `qlora-hal conformance` both call `run`."""

from __future__ import annotations

import datetime
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.contract.backend import CONTRACT_VERSION
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.files.output_path import writable_folder
from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import LEVELS, all_cases, section_of, suite_hash
from qlora_hal_conformance.certificate import Document, make_certificate, write_certificate
from qlora_hal_conformance.counting import Count, count
from qlora_hal_conformance.journal import Journal, result_as_json, result_from_json
from qlora_hal_conformance.localisation import localised
from qlora_hal_conformance.machine import machine_record
from qlora_hal_conformance.places import shortened_facts, shortened_result
from qlora_hal_conformance.request import DEFAULT_TIMEOUT_SECONDS, Request
from qlora_hal_conformance.running import MOST_LANES, run_cases, said_by_children
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.verdicts import CaseResult
from qlora_hal_conformance.waivers import WAIVERS_FILE, Waiver, apply_waivers, read_waivers

CONFORMANT, NOT_RUN, NOT_CONFORMANT = 0, 3, 20
"""Exit statuses: 3 where the backend cannot run on this machine, which is no verdict at all."""
LONGEST_TIMEOUT_SECONDS = 86400.0
MOST_GIVEN_LANES = 64
BESIDE_A_CERTIFICATE = "filtered"
"""The folder in `--out` that a filtered run writes into where `--out` holds the certificate of a whole run."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. Any of `keyword`, `sections`, `levels` makes it a run without a certificate."""

    reference: Reference
    out: Path
    seed: int | None = None
    keyword: str = ""
    sections: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    waivers: Path | None = None
    quiet: bool = False
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit status, every result, and the document that was written (unsigned when the run was filtered)."""

    status: int
    count: Count
    document: Document


def run(options: Options) -> Outcome:
    """Run the suite against one backend and write everything into `options.out`; a filtered run never touches a
    certificate, and writes into `filtered` beside it.

    Raises BackendNotFoundError, BackendConflictError, ConfigError, StorageError before any case runs. Whatever the
    backend does after that is a verdict.
    """
    require_listed(options.reference)
    _require_known_filters(options)
    require_usable_timeout(options.timeout_seconds)
    require_usable_lanes(options.lanes)
    waivers = _waivers(options)
    out = usable_folder(options.out)
    seed = secrets.randbits(48) if options.seed is None else options.seed
    console = Console(quiet=options.quiet)
    console.say(f"seed {seed}, {in_words(options.lanes)}")
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="qlora-hal-conformance-", ignore_cleanup_errors=True) as folder:
        request = Request(
            reference=options.reference,
            seed=seed,
            folder=folder,
            sections=options.sections,
            levels=options.levels,
            keyword=options.keyword,
            timeout_seconds=options.timeout_seconds,
        )
        if not any(request.wants(case) for case in all_cases()):
            raise _nothing_selected("in both the sections and the levels given")
        if request.is_filtered and (out / "certificate.json").exists():
            out = usable_folder(out / BESIDE_A_CERTIFICATE)
            console.say(f"{options.out} holds the certificate of a whole run, which stays: this run goes to {out}")
        run_cases(request, console.heard, lanes=options.lanes)
        journal = Journal(request.journal_path)
        events = list(journal.read())
        refusal = next((event for event in events if event["event"] == "not_ready"), None)
        if refusal is not None:
            console.say(f"not run on this machine: {refusal['reason']}\n  fix: {refusal['fix']}")
            return Outcome(NOT_RUN, Count(()), {})
        require_a_match(request, events)
        counted = apply_waivers(count(journal, _wanted(request, events)), waivers, started.date())
        found = localised(request, counted.results)
        extra = _extra_sections(request, console) if not request.is_filtered else []
        log = said_by_children(request)
    facts = {
        **facts_of(events, options.reference, seed, seed_was_given=options.seed is not None),
        "lanes": options.lanes,
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
        "extra_cases": [result_as_json(shortened_result(result)) for result in extra],
    }
    if found is not None:
        facts["localisation"] = found.as_json()
    counted = Count(tuple(map(shortened_result, counted.results)))
    return _write(out, request, counted, facts, log, console)


def require_listed(reference: Reference) -> None:
    """Refuse a name that nothing offers; a backend that cannot be imported is judged, not refused."""
    if reference.is_listed:
        from qlora_hal.detect.discovery import find, listed

        find(reference.backend, listed())


def _require_known_filters(options: Options) -> None:
    """A misspelled section would select nothing, and say nothing. Raises ConfigError QH-U52."""
    known = {section_of(case) for case in all_cases()}
    wrong = [s for s in options.sections if s not in known and s not in {name.partition("_")[0] for name in known}]
    wrong += [level for level in options.levels if level not in LEVELS]
    if wrong:
        raise ConfigError(
            "QH-U52",
            f"The suite has no section or level {', '.join(wrong)}.",
            fix=f"Sections: {', '.join(sorted(known))}. Levels: {', '.join(LEVELS)}.",
        )


def require_usable_timeout(seconds: float) -> None:
    """Raises ConfigError QH-N19; NaN would never end a case, and 0 every one."""
    if not 0.0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise ConfigError(
            "QH-N19",
            f"A case cannot have {seconds:g} seconds.",
            where="--timeout",
            fix=f"Give a number above 0 and up to {LONGEST_TIMEOUT_SECONDS:g}.",
        )


def require_usable_lanes(lanes: int) -> None:
    """Raises ConfigError QH-N19."""
    if not 1 <= lanes <= MOST_GIVEN_LANES:
        raise ConfigError(
            "QH-N19",
            f"Cases cannot run in {lanes} lanes.",
            where="--lanes",
            fix=f"Give a number from 1 to {MOST_GIVEN_LANES}, or leave it out: one a processor, up to {MOST_LANES}.",
        )


def in_words(lanes: int) -> str:
    return "1 lane" if lanes == 1 else f"{lanes} lanes"


def require_a_match(request: Request, events: Sequence[Mapping[str, object]]) -> None:
    """A keyword that selects nothing is misspelled, as a section would be. Raises ConfigError QH-U52."""
    names = {event["event"] for event in events}
    if request.keyword and "finished" in names and not names & {"started", "broke_off"}:
        raise _nothing_selected(f"that matches -k {request.keyword!r}")


def _nothing_selected(which: str) -> ConfigError:
    return ConfigError(
        "QH-U52",
        f"The suite has no case {which}.",
        fix="List the cases: python -m qlora_hal_conformance --list",
    )


def usable_folder(folder: Path) -> Path:
    """The folder, made and written to. Raises StorageError QH-S14, QH-S12, QH-S09."""
    try:
        return writable_folder(folder)
    except StorageError as error:
        error.where, error.fix = "--out", "Name another folder with --out."
        raise


def _waivers(options: Options) -> tuple[Waiver, ...]:
    path = options.waivers or Path(WAIVERS_FILE)
    if options.waivers is None and not path.is_file():
        return ()
    return read_waivers(path)


def _wanted(request: Request, events: Sequence[Mapping[str, object]]) -> list[str]:
    """The catalogue; for a filtered run its part that the filters let through."""
    if not request.is_filtered:
        return list(all_cases())
    selected = [case for case in all_cases() if request.wants(case)]
    if not request.keyword:
        return selected
    ran = {str(event["case"]) for event in events if event["event"] == "started"}
    return [case for case in selected if case in ran]


def _extra_sections(request: Request, console: Console) -> list[CaseResult]:
    from qlora_hal_conformance.extra_sections import offered_sections, run_extra

    offered = offered_sections(console.say)
    return run_extra(request, offered, console.heard) if offered else []


def facts_of(
    events: Sequence[Mapping[str, object]], reference: Reference, seed: int, *, seed_was_given: bool
) -> Document:
    """Everything of a certificate that is not a result."""
    backend: Document = {"name": reference.backend or reference.trainer}
    device: Document = {}
    kernel_paths: set[str] = set()
    probe: object = {}
    for event in events:
        spec = event.get("spec")
        if event["event"] == "subject" and isinstance(spec, dict):
            backend = spec
            probe = event.get("probe", probe)
        elif event["event"] == "device":
            paths = event.get("kernel_paths")
            kernel_paths |= set(map(str, paths)) if isinstance(paths, list) else set()
            device = {**event, "kernel_paths": sorted(kernel_paths)}
            del device["event"]
    return {
        "contract": CONTRACT_VERSION,
        "suite": {"version": SUITE_VERSION, "sha256": suite_hash()},
        "backend": backend,
        "probe": probe,
        "device": device,
        "machine": machine_record(),
        "seed": seed,
        "seed_was_given": seed_was_given,
    }


def _write(out: Path, request: Request, counted: Count, facts: Document, log: str, console: Console) -> Outcome:
    from qlora_hal_conformance.report import write_reports

    document = make_certificate(counted, shortened_facts(facts))
    if request.is_filtered:
        document = {**document, "conformant": False, "filtered": True}
        document.pop("sha256")
    (out / "run.log").write_text(log, encoding="utf-8")
    write_certificate(out / "results.json", document)
    if not request.is_filtered:
        write_certificate(out / "certificate.json", document)
    write_reports(out, document, counted.results)
    located = document.get("localisation")
    console.located(located.get("lines", []) if isinstance(located, dict) else [])
    console.summary(counted, document, out)
    status = CONFORMANT if document["conformant"] is True else NOT_CONFORMANT
    return Outcome(status, counted, document)


class Console:
    """Progress on stderr: a line for each section, and for each case that is not green."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._reason = ""
        self._left: dict[str, set[str]] = {}
        self._verdicts: dict[str, Counter[str]] = {}

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def heard(self, event: Mapping[str, object]) -> None:
        """Lanes work in several sections at once: a section is told when the last of its cases has ended."""
        if event["event"] == "broke_off":
            self.say(f"broke off: {event['how']}; what the process said is in run.log")
        cases = event.get("cases")
        if event["event"] == "wanted" and isinstance(cases, list) and not self._left:
            for case in map(str, cases):
                self._left.setdefault(section_of(case), set()).add(case)
        if event["event"] != "ended":
            return
        case, verdict = str(event["case"]), str(event["verdict"])
        section = section_of(case)
        self._verdicts.setdefault(section, Counter())[verdict] += 1
        if not result_from_json(event).verdict.is_green:
            reason = str(event["message"])
            self.say(f"{verdict:<12} {case}")
            self.say(f"{'':<12} {'the same' if reason == self._reason else reason}")
            self._reason = reason
        left = self._left.get(section, set())
        left.discard(case)
        if not left:
            self._tell(section)

    def _tell(self, section: str) -> None:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in self._verdicts.pop(section, Counter()).items())
        if counts:
            self.say(f"{section:<20} {counts}")

    def _end_sections(self) -> None:
        for section in tuple(self._verdicts):
            self._tell(section)
        self._left = {}

    def located(self, lines: Sequence[str]) -> None:
        """Where it is wrong, and what is still right."""
        self._end_sections()
        for line in lines:
            self.say(line)

    def summary(self, counted: Count, document: Mapping[str, object], out: Path) -> None:
        if document.get("filtered"):
            state = "filtered: no certificate"
        else:
            state = "conformant" if document["conformant"] else "not conformant"
        self.end(state, counted, document, out / "report.html")

    def end(self, state: str, counted: Count, document: Mapping[str, object], page: Path) -> None:
        """The last line: the state, how often each verdict was given, how long it took, and where to read on."""
        self._end_sections()
        counts = [f"{number} {verdict}" for verdict, number in counted.totals.items() if number]
        totals = ", ".join(counts) or "no case ran"
        self.say(f"{state}: {totals}; {document['wall_seconds']} s; see {page}")
