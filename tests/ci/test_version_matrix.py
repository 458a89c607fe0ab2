"""The matrix of versions: which Pythons it finds, which bounds it holds true, and that bounds above have a reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))
import version_matrix as matrix  # noqa: E402

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_python_is_taken_by_its_version_and_a_missing_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONS", f"/nowhere/python {sys.executable}")
    found = list(matrix.interpreters([THIS, "3.99"]))
    assert [(one.version, one.path) for one in found] == [(THIS, sys.executable)]
    assert "LEFT OUT: Python 3.99 is not here" in capsys.readouterr().out


def test_no_python_at_all_is_a_failure() -> None:
    command = [sys.executable, "ci/version_matrix.py", "--python", "3.99"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "nothing was tried" in ended.stderr


def test_corners_are_the_oldest_on_the_oldest_and_the_newest_on_the_newest() -> None:
    found = [matrix.Interpreter(version, "") for version in ("3.11", "3.12", "3.14")]
    assert [one.version for one in matrix.corner(found, "oldest")] == ["3.11"]
    assert [one.version for one in matrix.corner(found, "newest")] == ["3.14"]


def result(part: str, versions: str = "oldest", **found: tuple[str, str]) -> matrix.Result:
    return matrix.Result("3.12", versions, part, {"tests": {"passed": True, "seconds": 1.0}}, dict(found))


def test_a_bound_is_true_where_one_environment_was_made_with_it() -> None:
    core, backends = result("core", tokenizers=("0.21", "0.21")), result("backends", tokenizers=("0.21", "0.22.1"))
    assert matrix.unproved_bounds([core, backends]) == []
    (said,) = matrix.unproved_bounds([result("core", tokenizers=("0.21", "0.22")), backends])
    assert said == "tokenizers>=0.21 on Python 3.12: 0.22 is the oldest that could be installed"
    assert matrix.unproved_bounds([result("core", "newest", numpy=("1.26", "2.5"))]) == []
    assert matrix.unproved_bounds([backends]) == [], "the core alone may prove it, and was not tried"


def test_a_bound_that_was_not_run_and_a_step_that_failed_fail_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["version_matrix.py", "--python", THIS, "--versions", "oldest"])
    passed = result("core", numpy=("1.26", "1.26"))
    for shown, status in ((passed, 0), (result("core", numpy=("1.26", "2.0")), 1)):
        other = result("backends")
        other.bounds["torch"] = ("2.8", "2.8")
        results = {"core": shown, "backends": other}
        monkeypatch.setattr(matrix, "tried", lambda *asked, results=results: results[asked[2]])
        assert matrix.main() == status
    passed.steps["demo"] = {"passed": False, "seconds": 2.0}
    monkeypatch.setattr(matrix, "tried", lambda *_: passed)
    assert matrix.main() == 1


def test_record_keeps_the_environments_that_were_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    matrix.keep([result("core", numpy=("1.26", "1.26")), result("backends", torch=("2.8", "2.8"))], out)
    failed = result("core", numpy=("1.26", "1.26"))
    failed.steps["demo"] = {"passed": False, "seconds": 2.0}
    assert json.loads(out.read_text())["passed"]
    matrix.keep([failed], out)
    record = json.loads(out.read_text())
    assert [entry["part"] for entry in record["environments"]] == ["backends", "core"]
    assert (record["passed"], record["environments"][1]["bounds"]) == (False, {"numpy": ["1.26", "1.26"]})


def test_lower_bounds_are_read_through_the_extras_beside_what_is_installed() -> None:
    command = [sys.executable, "ci/lower_bounds.py", "dev"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert {"numpy", "pydantic", "torch", "mlx", "pytest", "gptqmodel"} <= set(found)
    assert "auto-gptq" not in found
    assert found["pydantic"][1] == version("pydantic")


def test_an_upper_bound_has_a_reason_beside_it() -> None:
    """A comment that names the package, on its line or above the lines that it stands among."""
    said = ""
    for line in (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0].splitlines():
        said += line.partition("#")[2]
        for name in re.findall(r'"([a-z_-]+)[^";]*(?:<|==|~=)\d', line.partition("#")[0]):
            assert name in said, f"why no newer {name}?"
        if line.rstrip().endswith("]"):
            said = ""


def test_workflow_runs_the_same_pythons() -> None:
    workflow = (ROOT / ".github" / "workflows" / "versions.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == list(matrix.PYTHONS)
