"""Runs of the suite on small backends, and certificates without a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from qlora_hal.contract.backend import CONTRACT_VERSION
from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import all_cases, suite_hash
from qlora_hal_conformance.certificate import Document, make_certificate
from qlora_hal_conformance.conformance_run import Options, Outcome, run
from qlora_hal_conformance.counting import Count
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.verdicts import CaseResult, Measure, Verdict

HERE = str(Path(__file__).parent)


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a part of the suite on one of `odd_backends`."""
    monkeypatch.setenv("PYTHONPATH", HERE)

    def judge(spec: str, *, keyword: str, timeout: float = 60.0, lanes: int = 1) -> Outcome:
        reference = Reference(spec=f"odd_backends:{spec}")
        out = tmp_path / "out"
        return run(Options(reference, out, seed=1, keyword=keyword, timeout_seconds=timeout, quiet=True, lanes=lanes))

    return judge


def suite(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user runs it in a folder of their own."""
    command = [sys.executable, "-m", "qlora_hal_conformance", *arguments]
    every = {**os.environ, "PYTHONPATH": HERE, **environment}
    return subprocess.run(command, cwd=cwd, env=every, capture_output=True, text=True, timeout=500, check=False)


def verdicts(outcome: Outcome) -> Mapping[str, Verdict]:
    return {result.case: result.verdict for result in outcome.count.results}


def passed(case: str) -> CaseResult:
    measures = (Measure("error", 1e-7, 1e-5, "8 u"),)
    return CaseResult(case, Verdict.PASSED, seconds=0.1, measures=measures, ran=("nf4/64 in float32",))


@pytest.fixture
def results() -> list[CaseResult]:
    """Every case, passed."""
    return [passed(case) for case in all_cases()]


def certificate_of(results: list[CaseResult]) -> Document:
    facts = {
        "contract": CONTRACT_VERSION,
        "suite": {"version": SUITE_VERSION, "sha256": suite_hash()},
        "backend": {
            "name": "toy",
            "title": "A toy",
            "capabilities": {"features": ["packing"], "weight_formats": ["nf4"]},
        },
        "probe": {"backend": "toy"},
        "device": {"device": "a device"},
        "seed": 5,
        "started": "2030-01-01T00:00:00+00:00",
        "wall_seconds": 1.0,
    }
    return make_certificate(Count(tuple(results)), facts)
