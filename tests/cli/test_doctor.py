"""Findings and the exit status that follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_hal.cli.doctor import accelerator_finding, exit_status, proof_finding
from qlora_hal.cli.findings import Finding, Verdict, disk_finding, memory_finding, storage_finding
from qlora_hal.contract.backend import Availability, ProbeReport


def test_a_folder_that_can_be_written_passes_and_stays_clean(tmp_path: Path) -> None:
    assert storage_finding(tmp_path).verdict is Verdict.PASS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("S27")
def test_a_folder_that_cannot_be_written_fails_with_a_fix(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").write_text("", encoding="utf-8")
        finding = storage_finding(folder)
        assert finding.verdict is Verdict.FAIL
        assert "local disk" in finding.fix
    assert disk_finding(tmp_path / "absent").verdict is Verdict.FAIL


def test_little_memory_is_a_warning_not_a_failure() -> None:
    assert memory_finding(2**20).verdict is Verdict.WARN
    assert memory_finding(2**40).verdict is Verdict.PASS
    assert memory_finding(None).verdict is Verdict.WARN


def test_a_proof_becomes_a_finding_with_its_checks() -> None:
    checks = [{"name": "gradients", "verdict": "fail", "detail": "3e-2 above 8e-6"}]
    finding = proof_finding("x", {"verdict": "fail", "reason": "wrong numbers", "fix": "update", "checks": checks})
    assert finding.verdict is Verdict.FAIL
    assert finding.details == ("gradients: fail 3e-2 above 8e-6",)


@pytest.mark.fault("N14", "N21")
def test_exit_is_3_when_a_ready_backend_fails_or_the_chosen_one_is_absent() -> None:
    good, absent = Finding("a", Verdict.PASS, ""), Finding("b", Verdict.ABSENT, "no device")
    bad, warning = Finding("c", Verdict.FAIL, ""), Finding("d", Verdict.WARN, "")
    assert exit_status([good, absent, warning], chosen=None) == 0
    assert exit_status([good, absent], chosen="b") == 3
    assert exit_status([good, absent], chosen="a") == 0
    assert exit_status([good, bad], chosen=None) == 3


@pytest.mark.parametrize(("found", "verdict"), [(False, Verdict.WARN), (True, Verdict.PASS)], ids=["CPU", "GPU"])
def test_a_backend_of_several_devices_is_an_accelerator_where_it_found_one(found: bool, verdict: Verdict) -> None:
    report = ProbeReport("gptq_int4", Availability.READY, "found", uses_accelerator=found)
    assert accelerator_finding([report]).verdict is verdict
