"""The certificate: what was run, where, with what result; signed by the hash of its own content.

The hash shows that a certificate was edited, not who made it. `problems` recomputes what can be recomputed without the
hardware: the hash, each verdict from its measures and its claim, the counts against the list of cases of the revision
that made it, the formats that ran against those declared, and `conformant`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import LEVELS, all_cases, contract_judged, level_of, revision_of
from qlora_hal_conformance.counting import Count, is_green_throughout
from qlora_hal_conformance.journal import result_as_json, result_from_json
from qlora_hal_conformance.judged_in import judged_in
from qlora_hal_conformance.verdicts import CaseResult, Claim, Verdict

SCHEMA = 1
HASH_FIELD = "sha256"
OF_A_RUN = "run"
"""What `kind` says in the results of `--for`."""
WITHOUT_JUDGED_IN = frozenset({"1", "2", "3"})
"""Revisions of the suite whose certificates do not say in which dtypes they judged."""

Document = dict[str, object]


def make_certificate(count: Count, facts: Mapping[str, object]) -> Document:
    """A signed document. `facts` are `contract`, `suite`, `backend`, `device`, `machine`, `seed` and the like."""
    document: Document = {
        "schema": SCHEMA,
        **facts,
        "conformant": count.all_green,
        "levels": count.levels,
        "totals": count.totals,
        "ran": sorted({name for result in count.results for name in result.ran}),
        "judged_in": judged_in(count.results, auto_dtype(facts)),
        "cases": [result_as_json(result) for result in count.results],
    }
    return {**document, HASH_FIELD: content_hash(document)}


def auto_dtype(document: Mapping[str, object]) -> str:
    """The compute dtype that `auto` takes on the device of a certificate: the best that it proved."""
    proved = _part(document, "backend").get("proved_dtypes")
    return str(proved[0]) if isinstance(proved, list) and proved else ""


def content_hash(document: Mapping[str, object]) -> str:
    """SHA-256 over the canonical JSON of everything but the hash itself: sorted keys, no spaces, UTF-8."""
    content = {key: value for key, value in document.items() if key != HASH_FIELD}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_certificate(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_certificate(path: Path) -> Document:
    """Raises ConfigError QH-B51 when the file is no certificate at all: no strict JSON, or nothing that has a hash."""
    from qlora_hal.errors import ConfigError
    from qlora_hal.files.strict_json import decode_object

    try:
        document = decode_object(path.read_bytes())
        if not isinstance(document.get("cases"), list):
            raise ValueError("it has no list of cases")
        content_hash(document)  # refuses what JSON allows and no run writes: half a surrogate pair, 1e999, deep nesting
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "QH-B51",
            f"{path.name} is no certificate: {error}.",
            where=str(path),
            fix="Name a certificate.json that the conformance suite wrote.",
        ) from error
    return document


def revision_that_made(document: Mapping[str, object]) -> str:
    """The present or an earlier published revision of the suite; empty when the certificate is of neither."""
    return revision_of(_part(document, "suite").get("sha256"))


def problems(document: Mapping[str, object]) -> list[str]:
    """Everything that does not add up; empty when the certificate verifies against the revision that made it."""
    found = []
    if document.get("kind") == OF_A_RUN:
        found.append("it is about one run (`--for`), which is no certificate")
    if document.get("schema") != SCHEMA:
        found.append(f"schema {document.get('schema')!r}, this suite reads {SCHEMA}")
    if document.get(HASH_FIELD) != content_hash(document):
        found.append("the content does not have the hash it is signed with: it was edited or damaged")
    revision = revision_that_made(document)
    version = _part(document, "suite").get("version")
    if not revision:
        found.append("it was made by another revision of the suite; this one cannot vouch for its bounds")
    elif version != revision:
        found.append(f"it says revision {version!r} of the suite, whose hash is that of revision {revision}")
    records = document.get("cases")
    assert isinstance(records, list)
    try:
        results = [result_from_json(record) for record in records]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return [*found, f"a case cannot be read: {error}"]
    found += _of_list(results, all_cases(revision or SUITE_VERSION))
    found += _of_records(records, results)
    found += _of_verdicts(results)
    found += _of_summary(document, results)
    return found + (_of_backend(document, results) if document.get("conformant") is True else [])


def _of_list(results: Sequence[CaseResult], wanted: Sequence[str]) -> list[str]:
    names = Counter(result.case for result in results)
    missing = [case for case in wanted if case not in names]
    unknown = [case for case in names if case not in set(wanted)]
    twice = [case for case, number in names.items() if number > 1]
    return _named({"missing": missing, "not in the catalogue": unknown, "listed twice": twice})


def _of_records(records: Sequence[object], results: Sequence[CaseResult]) -> list[str]:
    """The tightest measure and its margin stand in a record as well; a run writes them from the measures."""
    other = [result.case for record, result in zip(records, results, strict=True) if record != result_as_json(result)]
    return _named({"are not as a run writes them": other})


def _named(kinds: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{len(cases)} cases {what}: {', '.join(cases[:3])}" for what, cases in kinds.items() if cases]


def _of_verdicts(results: Sequence[CaseResult]) -> list[str]:
    undeclared = [r.case for r in results if r.verdict is Verdict.PASSED and r.claim is Claim.UNDECLARED]
    declared = [r.case for r in results if r.verdict is Verdict.REFUSED and r.claim is Claim.DECLARED]
    found = _named({"passed, yet undeclared": undeclared, "refused, yet declared": declared})
    for result in results:
        over = [measure for measure in result.measures if not measure.holds]
        if result.verdict is Verdict.PASSED and over:
            found.append(f"{result.case} passed, yet {over[0].what} is {over[0].measured:g}, above {over[0].bound:g}")
        if result.verdict is Verdict.WAIVED and not result.waiver.get("issue"):
            found.append(f"{result.case} is waived without an issue")
    return found


def _of_summary(document: Mapping[str, object], results: Sequence[CaseResult]) -> list[str]:
    found = []
    count = Count(tuple(results))
    revision = revision_that_made(document) or SUITE_VERSION
    judged = contract_judged(revision)
    if document.get("contract") != judged:
        found.append(f"contract {document.get('contract')!r}, its revision of the suite judges {judged}")
    if "filtered" in document:
        found.append("it is of a filtered run, which yields no certificate")
    if document.get("ran") != sorted({name for result in results for name in result.ran}):
        found.append("the formats and dtypes that ran are not those of its cases")
    says = document.get("judged_in")
    if (says is not None or revision not in WITHOUT_JUDGED_IN) and says != judged_in(results, auto_dtype(document)):
        found.append("the dtypes and families it was judged in are not those of its cases")
    if document.get("totals") != count.totals:
        found.append("the totals are not those of its cases")
    if document.get("conformant") is not count.all_green:
        found.append(f"it says conformant: {document.get('conformant')}, its cases say {count.all_green}")
    if document.get("levels") != {level: is_green_throughout(results, level) for level in LEVELS}:
        found.append("the levels are not those of its cases")
    return found


def _of_backend(document: Mapping[str, object], results: Sequence[CaseResult]) -> list[str]:
    """What holds for every conformant backend: it runs each format it declares, and its numbers were compared."""
    found = []
    backend = _part(document, "backend")
    name, probed = backend.get("name"), _part(document, "probe").get("backend")
    if probed != name:
        found.append(f"it is of {name!r}, yet the probe that ran is of {probed!r}")
    passed = [result for result in results if result.verdict is Verdict.PASSED]
    ran = {re.split("[/+ ]", text)[0] for result in passed for text in result.ran}
    formats = _part(backend, "capabilities").get("weight_formats")
    declared = {str(name) for name in formats} if isinstance(formats, list) else set()
    if declared != ran:
        found.append(f"it declares the formats {sorted(declared)}, its cases that passed ran {sorted(ran)}")
    if not any(result.measures for result in passed if level_of(result.case) == "L1"):
        found.append("no case of L1 compared a number")
    return found


def _part(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = document.get(key)
    return part if isinstance(part, dict) else {}
