"""A feature that a backend declares and a device may lack: asked once, and then every case of it may be refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conformance.conftest import HERE

from qlora_hal.contract.capabilities import Feature
from qlora_hal_conformance.device_features import with_device_features
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.subject import Reference, Subject
from qlora_hal_conformance.verdicts import Claim

NEEDS = (Feature.FP8_PRODUCTS, "bfloat16")


@pytest.fixture(autouse=True)
def _odd_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


@pytest.mark.parametrize(
    ("trainer", "claim"),
    [
        (SPEC.trainer, Claim.DECLARED),
        ("odd_backends:on_a_device_without_fp8", Claim.NARROWED),
        ("odd_backends:that_fails_in_fp8", Claim.DECLARED),
    ],
    ids=["served", "refused", "failing"],
)
def test_a_refusal_on_this_device_narrows_the_claim(trainer: str, claim: Claim) -> None:
    """One that fails otherwise has made no such claim: its cases are failed ones."""
    subject = Subject(Reference(), replace(SPEC, trainer=trainer), proved_dtypes=("bfloat16",))
    asked = with_device_features(subject)
    assert asked.claim(NEEDS) is claim
    assert asked.claim(("bfloat16",)) is Claim.DECLARED


def test_what_is_not_declared_is_not_asked() -> None:
    """Nothing is loaded: the trainer of this spec does not exist."""
    capabilities = replace(SPEC.capabilities, features=SPEC.capabilities.features - {Feature.FP8_PRODUCTS})
    subject = Subject(Reference(), replace(SPEC, trainer="odd_backends:nothing", capabilities=capabilities))
    assert with_device_features(subject).claim(NEEDS) is Claim.UNDECLARED
