"""The certificate: what was run, where, with what result; signed by the hash of its own content.

The hash shows that a certificate was edited, not who made it. `problems` recomputes what can be recomputed without the
hardware: the hash, each verdict from its measures, the counts against the catalogue, and `conformant`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_hal_conformance.catalogue import LEVELS, all_cases, suite_hash
from qlora_hal_conformance.counting import Count, is_green_throughout
from qlora_hal_conformance.journal import result_as_json, result_from_json
from qlora_hal_conformance.verdicts import CaseResult, Verdict

SCHEMA = 1
HASH_FIELD = "sha256"

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
        "cases": [result_as_json(result) for result in count.results],
    }
    return {**document, HASH_FIELD: content_hash(document)}


def content_hash(document: Mapping[str, object]) -> str:
    """SHA-256 over the canonical JSON of everything but the hash itself: sorted keys, no spaces, UTF-8."""
    content = {key: value for key, value in document.items() if key != HASH_FIELD}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_certificate(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_certificate(path: Path) -> Document:
    """Raises ConfigError QH-B51 when the file is no certificate at all."""
    from qlora_hal.errors import ConfigError

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not isinstance(document.get("cases"), list):
            raise ValueError("it has no list of cases")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            "QH-B51",
            f"{path.name} is no certificate: {error}.",
            where=str(path),
            fix="Name a certificate.json that the conformance suite wrote.",
        ) from error
    return document


def problems(document: Mapping[str, object]) -> list[str]:
    """Everything that does not add up; empty when the certificate verifies against this suite."""
    found = []
    if document.get("schema") != SCHEMA:
        found.append(f"schema {document.get('schema')!r}, this suite reads {SCHEMA}")
    if document.get(HASH_FIELD) != content_hash(document):
        found.append("the content does not have the hash it is signed with: it was edited or damaged")
    suite = document.get("suite")
    if not isinstance(suite, dict) or suite.get("sha256") != suite_hash():
        found.append("it was made by another revision of the suite; this one cannot vouch for its bounds")
    records = document.get("cases")
    assert isinstance(records, list)
    try:
        results = [result_from_json(record) for record in records]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [*found, f"a case cannot be read: {error}"]
    return found + _of_list(results) + _of_verdicts(results) + _of_summary(document, results)


def _of_list(results: Sequence[CaseResult]) -> list[str]:
    names = Counter(result.case for result in results)
    missing = [case for case in all_cases() if case not in names]
    unknown = [case for case in names if case not in all_cases()]
    twice = [case for case, number in names.items() if number > 1]
    kinds = (("missing", missing), ("not in the catalogue", unknown), ("listed twice", twice))
    return [f"{len(cases)} cases {kind}: {', '.join(cases[:3])}" for kind, cases in kinds if cases]


def _of_verdicts(results: Sequence[CaseResult]) -> list[str]:
    found = []
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
    if document.get("totals") != count.totals:
        found.append("the totals are not those of its cases")
    if document.get("conformant") is not count.all_green:
        found.append(f"it says conformant: {document.get('conformant')}, its cases say {count.all_green}")
    if document.get("levels") != {level: is_green_throughout(results, level) for level in LEVELS}:
        found.append("the levels are not those of its cases")
    return found
