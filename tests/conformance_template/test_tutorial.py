"""The tutorial is carried out word by word: the template becomes a distribution of its own, and is certified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_hal_conformance.certificate import problems

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("template")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out)}
    command = [str(ROOT / "ci" / "certify_template.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    document: dict[str, object] = json.loads((out / "certificate.json").read_text())
    return document


def test_template_is_certified_as_a_distribution_of_its_own(certificate: dict[str, object]) -> None:
    backend = certificate["backend"]
    assert isinstance(backend, dict)
    assert (backend["name"], backend["distribution"], backend["listed"]) == ("toy", "qlora-hal-toy", True)
    assert certificate["conformant"] is True
    assert problems(certificate) == []


def test_what_the_template_does_not_declare_is_refused(certificate: dict[str, object]) -> None:
    cases = certificate["cases"]
    assert isinstance(cases, list)
    refused = [case["case"] for case in cases if case["verdict"] == "refused"]
    for undeclared in ("nf4", "bfloat16", "dropout", "packed", "double"):
        assert any(undeclared in case for case in refused), f"no refused case about {undeclared}"


def test_template_builds_without_touching_the_checkout(certificate: dict[str, object]) -> None:
    template = ROOT / "examples" / "plugin_template"
    kept = sorted(p.relative_to(template).as_posix() for p in template.rglob("*") if "__pycache__" not in p.parts)
    assert [name for name in kept if (template / name).is_file()] == [
        ".github/workflows/conformance.yml",
        "pyproject.toml",
        "qlora_hal_toy/__init__.py",
        "qlora_hal_toy/trainer.py",
    ]
