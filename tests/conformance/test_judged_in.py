"""A certificate says in which dtypes and on which families it judged, and nothing of where things lie there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conformance.conftest import certificate_of

import qlora_hal
from qlora_hal.errors.installation import requirement
from qlora_hal_conformance.judged_in import Ran, cases_that_ran, judged_in, judged_in_words, read_ran
from qlora_hal_conformance.places import shortened, shortened_text
from qlora_hal_conformance.report import html_text, markdown_text
from qlora_hal_conformance.verdicts import CaseResult, Verdict

RESULTS = [
    CaseResult("30_forward/a", Verdict.PASSED, ran=("nf4/64 in float32", "nf4/64 in bfloat16")),
    CaseResult("30_forward/b", Verdict.PASSED, ran=("int8 in float32",)),
    CaseResult("31_gradients/a", Verdict.PASSED, ran=("nf4/64+double_quant in float32",)),
    CaseResult("32_families/a", Verdict.PASSED, ran=("nf4/64 in float32 of qwen2",)),
    CaseResult("40_step/a", Verdict.FAILED, ran=("nf4/64 in float16",)),
]


@pytest.mark.parametrize(
    ("text", "ran"),
    [
        ("nf4/64+double_quant in bfloat16", Ran("nf4", 64, True, "bfloat16")),
        ("int8 in float32", Ran("int8", None, False, "float32")),
        ("none in float16 of qwen2", Ran("none", None, False, "float16", "qwen2")),
        ("something else", None),
    ],
)
def test_what_a_case_ran_is_read(text: str, ran: Ran | None) -> None:
    assert read_ran(text) == ran


def test_passed_cases_are_counted_by_dtype_and_by_family() -> None:
    table = judged_in(RESULTS, "bfloat16")
    assert table == {
        "auto": "bfloat16",
        "dtypes": {
            "bfloat16": {"cases": 1, "sections": ["30_forward"]},
            "float32": {"cases": 4, "sections": ["30_forward", "31_gradients", "32_families"]},
        },
        "families": {
            "llama": {"cases": 3, "sections": ["30_forward", "31_gradients"]},
            "qwen2": {"cases": 1, "sections": ["32_families"]},
        },
    }
    assert judged_in_words(table)[0] == "bfloat16, which auto takes here: 1 case, in 30_forward"
    assert cases_that_ran(RESULTS, Ran("nf4", 64, False, "float32")) == ["30_forward/a"]


def test_dtype_of_auto_in_which_nothing_was_judged_is_said_first() -> None:
    assert judged_in_words(judged_in(RESULTS, "float16"))[0] == "float16, which auto takes here: no case"


def test_certificate_and_its_pages_say_it(results: list[CaseResult]) -> None:
    document = certificate_of(results)
    words = f"float32: {len(results)} cases, in 10_detection"
    assert words in html_text(document, results)
    assert words in markdown_text(document, results)


def test_page_says_where_a_red_run_is_wrong(results: list[CaseResult]) -> None:
    document = {**certificate_of(results), "localisation": {"lines": ["wrong: the adapter's part <b>"]}}
    assert "wrong: the adapter&#x27;s part &lt;b&gt;" in html_text(document, results)
    assert "- wrong: the adapter's part &lt;b>" in markdown_text(document, results)


# places ---------------------------------------------------------------------------------------------------------------
def test_places_of_this_machine_are_shortened() -> None:
    home, root = Path.home(), Path(qlora_hal.__file__).parent.parent
    assert shortened_text(f"see {home}/models/a") == "see ~/models/a"
    assert str(root) not in shortened_text(f"File '{root}/qlora_hal/api.py', line 3")
    assert shortened_text(f"{sys.prefix}/bin/python ends") == "<environment>/bin/python ends"
    assert shortened({"a": [f"{home}/b", 3]}) == {"a": ["~/b", 3]}


@pytest.mark.parametrize("text", ["/dev/nvidia0", "and/or", "https://example.org/a/b", "nf4/64 in float32", ""])
def test_what_is_no_place_of_this_machine_stays(text: str) -> None:
    assert shortened_text(text) == text


def test_advice_to_install_names_the_distribution() -> None:
    """Of an installation from a folder the advice holds that folder."""
    assert "qlora-hal[auto-gptq]" in shortened_text(f"pip install {requirement('auto-gptq')}")
    assert "-e" not in shortened_text(f"pip install {requirement('auto-gptq')}").split()
