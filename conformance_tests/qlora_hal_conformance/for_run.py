"""`--for run.yaml`: judge exactly what one run computes, and keep the result beside it."""

from __future__ import annotations

import datetime
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.errors import ConfigError
from qlora_hal.files import strict_json
from qlora_hal.files.replacing import replace_file
from qlora_hal_conformance.catalogue import FP8_SECTIONS, RUN_SECTIONS, RUN_SECTIONS_FOLDER, SECTIONS_FOLDER
from qlora_hal_conformance.certificate import HASH_FIELD, OF_A_RUN, SCHEMA, Document, content_hash
from qlora_hal_conformance.combination import AUTO, Combination, judged_in_words, not_judged_in_words
from qlora_hal_conformance.conformance_run import (
    CONFORMANT,
    NOT_CONFORMANT,
    NOT_RUN,
    Console,
    facts_of,
    in_words,
    require_a_match,
    require_listed,
    require_usable_lanes,
    require_usable_timeout,
    usable_folder,
)
from qlora_hal_conformance.counting import Count, count
from qlora_hal_conformance.journal import Journal, result_as_json
from qlora_hal_conformance.judged_in import judged_in
from qlora_hal_conformance.judged_run import JudgedRun, judged_run
from qlora_hal_conformance.localisation import localised
from qlora_hal_conformance.places import shortened, shortened_result
from qlora_hal_conformance.report import html_text
from qlora_hal_conformance.request import DEFAULT_TIMEOUT_SECONDS, Request
from qlora_hal_conformance.running import run_cases
from qlora_hal_conformance.software import Here, about_this_run
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.verdicts import Verdict

RESULT_FILE, PAGE_FILE = "conformance.json", "conformance.html"
"""What is written beside a run. No run writes or trusts files of these names."""


@dataclass(frozen=True, slots=True)
class ForOptions:
    """What the user asked for: a settings file or a run's folder. `reference` takes the place of the run's backend.
    With a `keyword` only some cases are run, and nothing is said of the run as a whole."""

    path: Path
    reference: Reference | None = None
    out: Path | None = None
    certificate: Path | None = None
    keyword: str = ""
    seed: int | None = None
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    quiet: bool = False
    lanes: int = 1


def judge_run(options: ForOptions) -> tuple[int, Document]:
    """Run the cases about one run's combination; the status, and the document that was written.

    Raises what `judged_run` raises, and ConfigError, StorageError, before any case runs.
    """
    require_usable_timeout(options.timeout_seconds)
    require_usable_lanes(options.lanes)
    if options.reference is not None:
        require_listed(options.reference)
    run = judged_run(options.path, options.reference)
    out = usable_folder(options.out or run.folder or Path("conformance") / f"for-{options.path.stem}")
    seed = secrets.randbits(48) if options.seed is None else options.seed
    console = Console(quiet=options.quiet)
    console.say(f"for {run.named}, on {_name(run.reference)}; seed {seed}, {in_words(options.lanes)}")
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="qlora-hal-conformance-", ignore_cleanup_errors=True) as folder:
        request = Request(
            reference=run.reference,
            seed=seed,
            folder=folder,
            sections=FP8_SECTIONS if run.combination.fp8_products else RUN_SECTIONS,
            keyword=options.keyword,
            timeout_seconds=options.timeout_seconds,
            combination=run.combination,
        )
        sections = (SECTIONS_FOLDER, RUN_SECTIONS_FOLDER)
        run_cases(request, console.heard, sections=sections, lanes=options.lanes)
        journal = Journal(request.journal_path)
        events = list(journal.read())
        refusal = next((event for event in events if event["event"] == "not_ready"), None)
        if refusal is not None:
            console.say(f"not run on this machine: {refusal['reason']}\n  fix: {refusal['fix']}")
            return NOT_RUN, {}
        require_a_match(request, events)
        counted = count(journal, _wanted(request, events))
        found = localised(request, counted.results)
    counted = Count(tuple(map(shortened_result, counted.results)))
    facts = {
        **facts_of(events, run.reference, seed, seed_was_given=options.seed is not None),
        "lanes": options.lanes,
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
    }
    document = _document(run, counted, facts)
    if options.keyword:
        document |= {"filtered": True, "holds": False}
    if found is not None:
        document["localisation"] = found.as_json()
    document["certificates"] = _certificates(options, run, out, document)
    document = _signed(shortened(document))
    replace_file(out / RESULT_FILE, strict_json.encode(document))
    replace_file(out / PAGE_FILE, html_text(document, counted.results).encode("utf-8"))
    _tell(console, document, counted, out)
    return CONFORMANT if document["holds"] is True else NOT_CONFORMANT, document


def holds(counted: Count) -> bool:
    """Every case was judged and passed: what a run uses may not be refused."""
    return bool(counted.results) and all(result.verdict is Verdict.PASSED for result in counted.results)


def _document(run: JudgedRun, counted: Count, facts: Mapping[str, object]) -> Document:
    backend = facts["backend"]
    proved = backend.get("proved_dtypes", []) if isinstance(backend, dict) else []
    dtype = _dtype(run.combination, proved)
    return {
        "schema": SCHEMA,
        "kind": OF_A_RUN,
        **facts,
        "holds": holds(counted),
        "run": {
            "named": run.named,
            "dtype": dtype,
            "combination": run.combination.as_json(),
            "judged": judged_in_words(run.combination, dtype),
            "not_judged": not_judged_in_words(run.combination),
        },
        "totals": counted.totals,
        "judged_in": judged_in(counted.results, proved[0] if proved else ""),
        "cases": [result_as_json(result) for result in counted.results],
    }


def _dtype(combination: Combination, proved: Sequence[str]) -> str:
    return combination.dtype if combination.dtype != AUTO else next(iter(proved), "")


def _signed(document: object) -> Document:
    assert isinstance(document, dict)
    return {**document, HASH_FIELD: content_hash(document)}


def _wanted(request: Request, events: Sequence[Mapping[str, object]]) -> list[str]:
    """The cases that the first child chose, which a restarted one chooses again; with a keyword those that began."""
    chosen = next((event["cases"] for event in events if event["event"] == "wanted"), [])
    cases = [str(case) for case in chosen] if isinstance(chosen, list) else []
    begun = {str(event["case"]) for event in events if event["event"] == "started"}
    return [case for case in cases if case in begun] if request.keyword else cases


def _certificates(options: ForOptions, run: JudgedRun, out: Path, document: Document) -> list[Document]:
    """What the certificate that was named, or those that lie where one is looked for, say of this run."""
    name = _name(run.reference)
    places = [options.certificate] if options.certificate else [out / "certificate.json", _default_place(name)]
    device, backend = document.get("device"), document.get("backend")
    told = device if isinstance(device, dict) else {}
    here = Here(
        str(backend.get("name", name)) if isinstance(backend, dict) else name,
        str(told.get("device", "")),
        told.get("versions"),
    )
    part = document["run"]
    assert isinstance(part, dict)
    found: list[Document] = []
    for path in dict.fromkeys(place.resolve() for place in places):
        if path.is_file() or options.certificate:
            found.append({"file": path.name, "says": _read(path, run.combination, str(part["dtype"]), here)})
    return found


def _read(path: Path, combination: Combination, dtype: str, here: Here) -> list[str]:
    try:
        return about_this_run(path, combination, dtype, here)
    except ConfigError as error:
        return [error.message]


def _default_place(name: str) -> Path:
    return Path("conformance") / name / "certificate.json"


def _name(reference: Reference) -> str:
    return reference.backend or (reference.trainer or reference.spec).partition(":")[0]


def _tell(console: Console, document: Document, counted: Count, out: Path) -> None:
    run, certificates, located = document["run"], document["certificates"], document.get("localisation", {})
    assert isinstance(run, dict)
    assert isinstance(certificates, list)
    assert isinstance(located, dict)
    console.located(located.get("lines", []))
    state = "right" if document["holds"] is True else "not right"
    for title, lines in (("judged", run["judged"]), ("not judged", run["not_judged"])):
        console.say(f"{title}:")
        for line in lines:
            console.say(f"  - {line}")
    for certificate in certificates:
        console.say(f"{certificate['file']}: {'; '.join(certificate['says'])}")
    said = (
        "filtered: nothing is said of the run"
        if document.get("filtered")
        else f"this run's combination is {state} here"
    )
    console.end(said, counted, document, out / PAGE_FILE)
