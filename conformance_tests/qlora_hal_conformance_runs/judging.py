"""`--for run.yaml`: judge what one run computes, its mixture of experts included, and keep the result beside it.

What the suite's own `for_run` does, on a reading of the run that knows more. Its parts are taken from there as they
are: the hash of the suite holds that module until the next revision.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qlora_hal.files import strict_json
from qlora_hal.files.replacing import replace_file
from qlora_hal_conformance.catalogue import FP8_SECTIONS, RUN_SECTIONS, RUN_SECTIONS_FOLDER, SECTIONS_FOLDER, number_of
from qlora_hal_conformance.certificate import Document
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
from qlora_hal_conformance.for_run import (
    PAGE_FILE,
    RESULT_FILE,
    ForOptions,
    _certificates,
    _document,
    _name,
    _signed,
    _tell,
    _wanted,
)
from qlora_hal_conformance.journal import Journal
from qlora_hal_conformance.localisation import localised
from qlora_hal_conformance.places import shortened, shortened_result
from qlora_hal_conformance.report import html_text
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.running import run_cases
from qlora_hal_conformance_runs.asked_run import AskedRun, asked_run

HERE = Path(__file__).parent
OWN_FOLDER, OWN_SECTION = HERE / "sections", "36"
EIGHT_BIT_FOLDER = HERE / "sections_of_eight_bits"
OF_DENSE_MODELS = "35"
"""The suite's section that judges a dense run's combination, which section 36 does for a mixture."""


def judge_run(options: ForOptions) -> tuple[int, Document]:
    """Run the cases about one run; the status, and the document that was written.

    Raises what `asked_run` raises, and ConfigError, StorageError, before any case runs.
    """
    require_usable_timeout(options.timeout_seconds)
    require_usable_lanes(options.lanes)
    if options.reference is not None:
        require_listed(options.reference)
    asked = asked_run(options.path, options.reference)
    run = asked.run
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
            sections=sections_about(asked),
            keyword=options.keyword,
            timeout_seconds=options.timeout_seconds,
            combination=run.combination,
        )
        if asked.mixture is not None:
            asked.mixture.write(Path(folder))
        run_cases(request, console.heard, sections=_folders(asked), lanes=options.lanes)
        journal = Journal(request.journal_path)
        events = list(journal.read())
        refusal = next((event for event in events if event["event"] == "not_ready"), None)
        if refusal is not None:
            console.say(f"not run on this machine: {refusal['reason']}\n  fix: {refusal['fix']}")
            return NOT_RUN, {}
        require_a_match(request, events)
        counted = count(journal, _wanted(request, events))
        # The second look is at a Llama, of which section 36 says nothing.
        found = localised(request, [result for result in counted.results if number_of(result.case) != OWN_SECTION])
    counted = Count(tuple(map(shortened_result, counted.results)))
    facts = {
        **facts_of(events, run.reference, seed, seed_was_given=options.seed is not None),
        "sources_for_a_run": sources_hash(),
        "lanes": options.lanes,
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
    }
    document = _in_words(_document(run, counted, facts), asked)
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


def sections_about(asked: AskedRun) -> tuple[str, ...]:
    """The numbers of the sections whose cases may be about a run."""
    if asked.run.combination.fp8_products:
        return FP8_SECTIONS
    if asked.mixture is None:
        return RUN_SECTIONS
    return tuple(OWN_SECTION if number == OF_DENSE_MODELS else number for number in RUN_SECTIONS)


def sources_hash() -> str:
    """SHA-256 over all that decides a case here and is no source of the suite."""
    digest = hashlib.sha256()
    for path in sorted(HERE.rglob("*.py")):
        digest.update(f"{path.relative_to(HERE).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()


def _folders(asked: AskedRun) -> tuple[Path, ...]:
    if asked.mixture is not None:
        return SECTIONS_FOLDER, OWN_FOLDER
    return SECTIONS_FOLDER, RUN_SECTIONS_FOLDER if asked.run.combination.has_exact_moments else EIGHT_BIT_FOLDER


def _in_words(document: Document, asked: AskedRun) -> Document:
    """What was judged, and what was not, of the run as it is read here."""
    run = document["run"]
    assert isinstance(run, Mapping)
    words = {"judged": asked.judged_in_words(str(run["dtype"])), "not_judged": asked.not_judged_in_words()}
    mixture = {"mixture": asked.mixture.as_json()} if asked.mixture is not None else {}
    return {**document, "run": {**run, **words, **mixture}}
