"""A certificate that was edited does not verify, whatever was edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.conftest import certificate_of, passed

from qlora_hal.errors import ConfigError
from qlora_hal_conformance.__main__ import main
from qlora_hal_conformance.catalogue import all_cases
from qlora_hal_conformance.certificate import Document, content_hash, problems, read_certificate, write_certificate
from qlora_hal_conformance.verdicts import CaseResult, Measure, Verdict

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


EDITS: dict[str, tuple[Edit, str]] = {
    "verdict": (_fail_one, "totals"),
    "measured above bound": (_exceed, "above"),
    "case taken out": (lambda d: d["cases"].pop(), "missing"),  # type: ignore[attr-defined]
    "case doubled": (lambda d: d["cases"].append(d["cases"][0]), "twice"),  # type: ignore[attr-defined,index]
    "unknown case": (lambda d: _case(d).update(case="99_new/case"), "not in the catalogue"),
    "totals": (lambda d: d["totals"].update(passed=1), "totals"),  # type: ignore[attr-defined]
    "levels": (lambda d: d["levels"].update(L0=False), "levels"),  # type: ignore[attr-defined]
    "conformant": (lambda d: d.update(conformant=False), "conformant"),
    "suite": (lambda d: d.update(suite={"version": "1", "sha256": "0"}), "another revision"),
    "schema": (lambda d: d.update(schema=9), "schema"),
    "unreadable case": (lambda d: _case(d).update(verdict="splendid"), "cannot be read"),
    "waived without issue": (lambda d: _case(d).update(verdict="waived"), "without an issue"),
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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cases": 3}'])
def test_file_that_is_no_certificate_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no certificate") as refusal:
        read_certificate(path)
    assert refusal.value.code == "QH-B51"
    assert main(["--verify", str(path)]) == 2
    assert "QH-B51" in capsys.readouterr().err


def test_every_case_of_the_catalogue_is_wanted() -> None:
    assert problems(certificate_of([passed(case) for case in all_cases()])) == []
