"""L0: the light module. What a backend says of itself before anything heavy is imported."""

from __future__ import annotations

import re

from qlora_hal.contract.backend import CONTRACT_VERSION, Availability
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.formats.catalogue import wrong_claims
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.parameters import DTYPES
from qlora_hal_conformance.probe_in_child import look_in_child
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.subject import Subject
from qlora_hal_conformance.tolerances import probe_time

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
LEVELS = {"none", "8bit", "4bit"}


def test_probe_is_fast(run_request: Request, judging: Judge) -> None:
    """Asking whether the backend can run costs less than 50 ms once its light module is imported."""
    judging.at_most("probe seconds, best of several", look_in_child(run_request.reference)["seconds"], probe_time())


def test_probe_imports_no_tensor_library(run_request: Request) -> None:
    imported = look_in_child(run_request.reference)["imported"]
    assert not imported, f"importing the spec and probing imported {imported}"


def test_probe_says_what_is_missing(run_request: Request) -> None:
    """On a machine without any tensor library the probe does not raise, and says what is missing and how to get it;
    a backend that is READY all the same must open."""
    answer = look_in_child(run_request.reference, without_libraries=True)
    _check_report(answer["probe"])
    assert not answer["opened"], f"READY without any library, but it did not open: {answer['opened']}"


def test_probe_report_is_complete(run_request: Request, subject: Subject) -> None:
    report = look_in_child(run_request.reference)["probe"]
    _check_report(report)
    assert report["backend"] == subject.spec.name, "the report names another backend"


def _check_report(report: dict[str, object]) -> None:
    availability = Availability(str(report["availability"]))
    if availability is not Availability.READY:
        assert report["reason"], f"{availability.value} without a reason"
        assert report["fix"], f"{availability.value} without a fix"
    versions = report["versions"]
    assert isinstance(versions, dict)
    assert all(isinstance(value, str) for value in versions.values()), "versions are no strings"


def test_spec_is_sane(subject: Subject) -> None:
    spec = subject.spec
    assert NAME.fullmatch(spec.name), f"name {spec.name!r}: lower case letters, digits and single underscores"
    assert spec.title.strip(), "no title"
    assert type(spec.priority) is int, f"priority is a {type(spec.priority).__name__}"
    assert re.fullmatch(r"[\w.]+:[\w.]+", spec.trainer), f"trainer {spec.trainer!r} is not package.module:Name"
    assert callable(spec.probe), "probe cannot be called"
    assert all(isinstance(choices, tuple) and choices for choices in spec.option_choices.values()), "option_choices"


def test_contract_version_is_this_one(subject: Subject) -> None:
    assert subject.spec.contract == CONTRACT_VERSION, f"written for contract {subject.spec.contract}"


def test_capabilities_are_sane(subject: Subject) -> None:
    """At least one weight format and one compute dtype; levels and block sizes speak of declared formats."""
    claimed = subject.capabilities
    assert claimed.weight_formats, "no weight format is declared"
    assert all(isinstance(f, WeightFormat) for f in claimed.weight_formats), "weight formats are WeightFormat values"
    assert claimed.compute_dtypes, "no compute dtype is declared"
    assert claimed.compute_dtypes <= set(DTYPES), f"unknown compute dtypes {claimed.compute_dtypes - set(DTYPES)}"
    assert all(isinstance(feature, Feature) for feature in claimed.features), "features are Feature values"
    assert set(claimed.levels) <= LEVELS, f"unknown levels {set(claimed.levels) - LEVELS}"
    assert set(claimed.levels.values()) <= claimed.weight_formats, "a level maps to a format that is not declared"
    assert set(claimed.block_sizes) <= claimed.weight_formats, "block sizes of a format that is not declared"
    for weight_format, sizes in claimed.block_sizes.items():
        assert sizes, f"{weight_format.value} has no block size"
        assert all(type(size) is int and size > 0 for size in sizes), f"{weight_format.value}: {sizes}"
    wrong = wrong_claims(claimed)
    assert not wrong, "; ".join(wrong)
    can_load = {Feature.QUANTIZE_ON_LOAD, Feature.LOAD_PREQUANTIZED} & claimed.features
    assert can_load or claimed.weight_formats == {WeightFormat.NONE}, "quantized formats, but no way to load any"


def test_capabilities_are_data(subject: Subject) -> None:
    """The record survives JSON: it is printed, compared and kept in certificates."""
    import json

    record = subject.capabilities.as_json()
    assert json.loads(json.dumps(record)) == record


def test_device_proves_what_is_declared(subject: Subject) -> None:
    """The proved compute dtypes are among the declared ones, and there is one."""
    assert subject.proved_dtypes, "the device proved no compute dtype"
    extra = set(subject.proved_dtypes) - subject.capabilities.compute_dtypes
    assert not extra, f"proved, but not declared: {sorted(extra)}"
