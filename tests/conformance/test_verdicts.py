"""The five verdicts."""

from __future__ import annotations

import math

import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.subject import Family, Need, Reference, Subject
from qlora_hal_conformance.tolerances import EXACT, Bound
from qlora_hal_conformance.verdicts import Claim, Measure, Phase, Verdict, judge

REFUSAL = UnsupportedFeatureError("QH-B01", "Backend toy has no packing.", fix="Use another.")
MUTE = UnsupportedFeatureError("QH-B01", "Backend toy has no packing.", fix=" ")
UNKNOWN_MODEL = ModelError("QH-M51", "Gemma 2 is not computed here.", fix="Take another model.")
OTHER = KeyError("packing")


@pytest.mark.parametrize(
    ("needs", "claim"),
    [
        ((Family("gemma2"),), Claim.DECLARED),
        ((Family("mamba"),), Claim.OPEN),
        ((Family("gemma2", varied=True),), Claim.OPEN),
        ((Family("mamba"), Feature.PEAK_MEMORY), Claim.OPEN),
        ((Family("gemma2"), Feature.PEAK_MEMORY), Claim.UNDECLARED),
    ],
)
def test_models_that_no_declaration_covers_are_open(needs: tuple[Need, ...], claim: Claim) -> None:
    assert Subject(Reference(), SPEC).claim(needs) is claim


@pytest.mark.parametrize(
    ("claim", "error", "verdict", "words"),
    [
        (Claim.DECLARED, None, Verdict.PASSED, ""),
        (Claim.DECLARED, OTHER, Verdict.FAILED, "KeyError"),
        (Claim.DECLARED, REFUSAL, Verdict.FAILED, "declared, but refused"),
        (Claim.UNDECLARED, REFUSAL, Verdict.REFUSED, "no packing"),
        (Claim.UNDECLARED, None, Verdict.FAILED, "declare it"),
        (Claim.UNDECLARED, OTHER, Verdict.FAILED, "UnsupportedFeatureError was expected"),
        (Claim.UNDECLARED, MUTE, Verdict.FAILED, "what to do"),
        (Claim.NARROWED, None, Verdict.PASSED, ""),
        (Claim.NARROWED, REFUSAL, Verdict.REFUSED, "no packing"),
        (Claim.NARROWED, OTHER, Verdict.FAILED, "KeyError"),
        (Claim.OPEN, None, Verdict.PASSED, ""),
        (Claim.OPEN, REFUSAL, Verdict.REFUSED, "no packing"),
        (Claim.OPEN, UNKNOWN_MODEL, Verdict.REFUSED, "not computed"),
        (Claim.OPEN, MUTE, Verdict.FAILED, "what to do"),
        (Claim.OPEN, OTHER, Verdict.FAILED, "KeyError"),
        (Claim.DECLARED, UNKNOWN_MODEL, Verdict.FAILED, "not computed"),
        (Claim.UNDECLARED, UNKNOWN_MODEL, Verdict.FAILED, "UnsupportedFeatureError was expected"),
    ],
)
def test_verdict_of_a_call(claim: Claim, error: Exception | None, verdict: Verdict, words: str) -> None:
    given = judge([Phase("setup"), Phase("call", error), Phase("teardown")], claim)
    assert given.verdict is verdict
    assert words in given.message


@pytest.mark.parametrize("claim", Claim)
def test_skip_is_inconclusive_wherever_it_happens(claim: Claim) -> None:
    for name in ("setup", "call"):
        assert judge([Phase("setup"), Phase(name, None, was_skipped=True)], claim).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("name", ["setup", "teardown"])
def test_refusal_outside_the_call_is_a_failure(name: str) -> None:
    """A backend that refuses while it is opened or closed has not refused what the case asks for."""
    given = judge([Phase("setup"), Phase("call", REFUSAL), Phase(name, REFUSAL)], Claim.UNDECLARED)
    assert given.verdict is Verdict.FAILED
    assert name in given.message


def test_case_that_was_never_called_is_inconclusive() -> None:
    assert judge([Phase("setup")], Claim.DECLARED).verdict is Verdict.INCONCLUSIVE


def test_only_passed_and_refused_are_green() -> None:
    assert [verdict for verdict in Verdict if verdict.is_green] == [Verdict.PASSED, Verdict.REFUSED]


@pytest.mark.parametrize("found", [math.nan, math.inf, -math.inf, 1.5])
def test_number_outside_its_bound_fails_and_is_written_down(found: float) -> None:
    judging = Judge()
    with pytest.raises(AssertionError, match="loss"):
        judging.within("loss", [1.0, found], [1.0, 1.0], Bound(0.25, "a quarter"))
    assert not judging.measures[-1].holds


def test_names_that_differ_fail_before_values_are_compared() -> None:
    one, other = {"a": [1.0]}, {"b": [1.0]}
    with pytest.raises(AssertionError, match="missing"):
        Judge().all_within("tensors", one, other, {"b": EXACT})  # type: ignore[dict-item]


def test_nothing_to_compare_is_no_agreement() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        Judge().within("empty", [], [], EXACT)


def test_change_that_must_show_is_measured_against_rounding() -> None:
    judging = Judge()
    judging.apart("logits", [1.0, 2.0], [1.0, 2.5], Bound(0.1, "rounding"))
    assert judging.measures[-1].measured == pytest.approx(0.2)
    with pytest.raises(AssertionError):
        judging.apart("logits", [1.0, 2.0], [1.0, 2.05], Bound(0.1, "rounding"))


def test_part_of_a_bound_that_was_used() -> None:
    assert Measure("x", 0.0, 0.0, "exact").used == 0.0
    assert Measure("x", 1e-9, 0.0, "exact").used == math.inf
    assert Measure("x", 1.0, 4.0, "four").used == 0.25
    assert not Measure("x", math.nan, 4.0, "four").holds
