"""The page of a certificate opens on a phone at once: it is under 150 kB, and says of a refusal what was lacking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_hal_conformance.journal import result_from_json
from qlora_hal_conformance.report import html_text

KEPT = sorted((Path(__file__).parents[2] / "docs" / "certificates").glob("*.json"))
MOST_BYTES = 150_000


def page_of(certificate: Path) -> str:
    document = json.loads(certificate.read_text(encoding="utf-8"))
    return html_text(document, [result_from_json(case) for case in document["cases"]])


@pytest.mark.parametrize("certificate", KEPT, ids=lambda path: str(path.stem))
def test_the_page_of_a_kept_certificate_is_light(certificate: Path) -> None:
    assert len(page_of(certificate).encode()) < MOST_BYTES


def test_a_refused_row_says_what_was_lacking_and_not_on_which_backend() -> None:
    page = page_of(next(path for path in KEPT if path.stem == "cpu_torch"))
    assert "<p>compute dtype float16 (has bfloat16, float32).</p>" in page
    assert "does not support what was requested" not in page
