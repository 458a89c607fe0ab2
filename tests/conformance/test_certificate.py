"""A certificate that was edited does not verify, whatever was edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.conftest import certificate_of, passed

from qlora_hal.errors import ConfigError
from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.__main__ import main
from qlora_hal_conformance.catalogue import EARLIER_REVISIONS, all_cases
from qlora_hal_conformance.certificate import Document, content_hash, problems, read_certificate, write_certificate
from qlora_hal_conformance.verdicts import CaseResult, Claim, Measure, Verdict

KEPT = sorted((Path(__file__).resolve().parents[2] / "docs" / "certificates").glob("*.json"))
Edit = Callable[[Document], object]


def _case(document: Document, number: int = 3) -> dict[str, object]:
    cases = document["cases"]
    assert isinstance(cases, list)
    record = cases[number]
    assert isinstance(record, dict)
    return record


def _fail_one(document: Document) -> None:
    _case(document)["verdict"] = "failed"


def _exceed(document: Document) -> None:
    measures = _case(document)["measures"]
    assert isinstance(measures, list)
    measures[0]["measured"] = 1.0


def _no_measures(document: Document) -> None:
    cases = document["cases"]
    assert isinstance(cases, list)
    for record in cases:
        for key in ("measured", "bound", "margin"):
            del record[key]
        record["measures"] = []


EDITS: dict[str, tuple[Edit, str]] = {
    "verdict": (_fail_one, "totals"),
    "measured above bound": (_exceed, "above"),
    "case taken out": (lambda d: d["cases"].pop(), "missing"),  # type: ignore[attr-defined]
    "case doubled": (lambda d: d["cases"].append(d["cases"][0]), "twice"),  # type: ignore[attr-defined,index]
    "unknown case": (lambda d: _case(d).update(case="99_new/case"), "not in the catalogue"),
    "totals": (lambda d: d["totals"].update(passed=1), "totals"),  # type: ignore[attr-defined]
    "dtypes": (lambda d: d["judged_in"].update(auto="bfloat16"), "dtypes and families"),  # type: ignore[attr-defined]
    "dtypes left out": (lambda d: d.pop("judged_in"), "dtypes and families"),
    "levels": (lambda d: d["levels"].update(L0=False), "levels"),  # type: ignore[attr-defined]
    "conformant": (lambda d: d.update(conformant=False), "conformant"),
    "suite": (lambda d: d.update(suite={"version": "1", "sha256": "0"}), "another revision"),
    "schema": (lambda d: d.update(schema=9), "schema"),
    "unreadable case": (lambda d: _case(d).update(verdict="splendid"), "cannot be read"),
    "waived without issue": (lambda d: _case(d).update(verdict="waived"), "without an issue"),
    "passed undeclared": (lambda d: _case(d).update(claim="undeclared"), "passed, yet undeclared"),
    "refused declared": (lambda d: _case(d).update(verdict="refused"), "refused, yet declared"),
    "margin": (lambda d: _case(d).update(margin=1e9), "not as a run writes them"),
    "case by number": (lambda d: _case(d).update(case=5), "not as a run writes them"),
    "no measures": (_no_measures, "no case of L1 compared a number"),
    "contract": (lambda d: d.update(contract=9), "contract 9"),
    "filtered": (lambda d: d.update(filtered=True), "filtered run"),
    "ran": (lambda d: d.update(ran=["fp4/64 in float32"]), "that ran"),
    "another backend's name": (lambda d: d["backend"].update(name="other"), "the probe that ran"),  # type: ignore[attr-defined,index]
    "declared formats": (
        lambda d: d["backend"]["capabilities"].update(weight_formats=["nf4", "fp4"]),  # type: ignore[attr-defined,index]
        "declares the formats",
    ),
    "revision": (lambda d: d["suite"].update(version="1"), "says revision '1'"),  # type: ignore[attr-defined,index]
}


def test_untouched_certificate_verifies(results: list[CaseResult], tmp_path: Path) -> None:
    document = certificate_of(results)
    assert document["conformant"] is True
    path = tmp_path / "certificate.json"
    write_certificate(path, document)
    assert problems(read_certificate(path)) == []
    assert main(["--verify", str(path)]) == 0


@pytest.mark.parametrize("edit", EDITS)
def test_edited_certificate_does_not_verify(edit: str, results: list[CaseResult]) -> None:
    change, words = EDITS[edit]
    document = json.loads(json.dumps(certificate_of(results)))
    change(document)
    assert any("hash" in problem for problem in problems(document))
    # Whoever also signs it anew is caught by what is recomputed.
    document["sha256"] = content_hash(document)
    assert any(words in problem for problem in problems(document)), problems(document)


def test_backend_or_device_edited_breaks_the_hash(results: list[CaseResult]) -> None:
    for part in ("backend", "device"):
        document = json.loads(json.dumps(certificate_of(results)))
        document[part]["device"] = "another"
        assert problems(document) == ["the content does not have the hash it is signed with: it was edited or damaged"]


def test_certificate_of_a_failure_verifies_and_is_not_conformant(results: list[CaseResult], tmp_path: Path) -> None:
    results[5] = replace(results[5], verdict=Verdict.FAILED, measures=(Measure("x", float("inf"), 1.0, "one"),))
    document = certificate_of(results)
    assert document["conformant"] is False
    write_certificate(tmp_path / "certificate.json", document)
    assert problems(read_certificate(tmp_path / "certificate.json")) == []
    assert main(["--verify", str(tmp_path / "certificate.json")]) == 20


@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.WAIVED])
def test_one_case_that_is_not_green_is_enough(verdict: Verdict, results: list[CaseResult]) -> None:
    results[-1] = replace(results[-1], verdict=verdict, waiver={"issue": "https://example.org/1"})
    assert certificate_of(results)["conformant"] is False


def test_no_case_at_all_is_not_conformant() -> None:
    assert certificate_of([])["conformant"] is False


def test_hash_does_not_depend_on_order_or_spaces(results: list[CaseResult]) -> None:
    document = certificate_of(results)
    turned = dict(reversed(list(json.loads(json.dumps(document, indent=7)).items())))
    assert content_hash(turned) == document["sha256"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"cases": 3}',
        '{"cases": [], "seed": NaN}',
        '{"cases": [], "seed": 1e999}',
        '{"cases": [], "started": "\\ud800"}',
        '{"cases": [], "conformant": false, "conformant": true}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:50],
)
def test_file_that_is_no_certificate_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no certificate") as refusal:
        read_certificate(path)
    assert refusal.value.code == "QH-B51"
    assert main(["--verify", str(path)]) == 2
    assert "QH-B51" in capsys.readouterr().err


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_certificate_verifies(path: Path) -> None:
    assert problems(read_certificate(path)) == []


def test_certificate_of_an_earlier_revision_is_held_to_its_own_cases_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revision, sha256 = EARLIER_REVISIONS[0]
    document = certificate_of([passed(case) for case in all_cases(revision)])
    document |= {"suite": {"version": revision, "sha256": sha256}, "contract": 1}
    path = tmp_path / "certificate.json"
    write_certificate(path, {**document, "sha256": content_hash(document)})
    assert main(["--verify", str(path)]) == 0
    assert (
        f"verifies: conformant to revision 1 of the suite; the present one is {SUITE_VERSION}\n"
        in capsys.readouterr().out
    )

    write_certificate(path, {**document, "contract": 2, "sha256": content_hash({**document, "contract": 2})})
    assert main(["--verify", str(path)]) == 20
    assert "contract 2, its revision of the suite judges 1" in capsys.readouterr().out

    document["cases"] = [record for record in document["cases"] if record["case"] != all_cases(revision)[0]]  # type: ignore[attr-defined]
    write_certificate(path, {**document, "sha256": content_hash(document)})
    assert main(["--verify", str(path)]) == 20
    assert f"1 cases missing: {all_cases(revision)[0]}" in capsys.readouterr().out


def test_refused_cases_alone_are_no_certificate(results: list[CaseResult]) -> None:
    """Everything undeclared and refused: the formats that the spec declares never ran."""
    refused = [replace(r, verdict=Verdict.REFUSED, claim=Claim.UNDECLARED, measures=(), ran=()) for r in results]
    assert any("declares the formats ['nf4']" in problem for problem in problems(certificate_of(refused)))


def test_every_case_of_the_catalogue_is_wanted() -> None:
    assert problems(certificate_of([passed(case) for case in all_cases()])) == []
