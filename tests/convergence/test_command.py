"""`python -m qlora_hal_conformance.convergence`: references made, a backend judged, defects refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_hal_conformance.convergence import __main__ as command
from qlora_hal_conformance.convergence import comparison, tasks
from qlora_hal_conformance.convergence.training import Settings
from qlora_hal_conformance.mutants.convergence import DEFECTS, HONEST

SHORT = Settings(steps=6, learning_rate=1e-3, rows=2)


@pytest.fixture(scope="module")
def short_references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seeds of a few steps: enough to be judged by, and no reference for anything else."""
    path = tmp_path_factory.mktemp("short") / "references.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "HELD_OUT", 8)
        patch.setitem(comparison.SETTINGS, ("demo", "records"), SHORT)  # type: ignore[arg-type]
        asked = ["--backend", "cpu_torch", "--task", "records", "--seeds", "4", "--make-references"]
        assert command.main([*asked, "--out", str(path)]) == command.PASSES
    return path


def judged(references: Path, *more: str) -> int:
    """The status of the command on four seeds of `records`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "HELD_OUT", 8)
        asked = ["--backend", "cpu_torch", "--task", "records", "--seeds", "4", "--references", str(references)]
        return command.main([*asked, *more])


@pytest.mark.long
def test_honest_backend_passes_and_says_what_it_was_judged_by(
    short_references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(short_references, "--dtype", "float32", "--out", str(tmp_path / "result.json")) == command.PASSES
    told = capsys.readouterr().out
    assert "indistinguishable from the reference" in told
    assert "4 runs of the same seeds" in told
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["passes"] is True
    assert result["weights_apart"] < 1e-3
    assert result["tasks"]["records"]["judgement"]["paired"] is True
    assert result["device"]
    assert result["defect"] is None


@pytest.mark.long
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_refused(short_references: Path, defect: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(short_references, "--dtype", "float32", "--defect", defect) == command.DOES_NOT
    assert "NOT shown to be like the reference" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("variation", HONEST)
def test_honest_variation_passes(short_references: Path, variation: str) -> None:
    assert judged(short_references, "--dtype", "float32", "--defect", variation) == command.PASSES


@pytest.mark.long
def test_references_of_other_rows_are_refused(
    short_references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(short_references.read_text(encoding="utf-8"))
    document["tasks"]["records"]["data_sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(document), encoding="utf-8")
    assert judged(tmp_path / "other.json") == 2
    assert "QH-B52" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--backend", "cpu_torch", "--first-seed", "15"]])
def test_no_backend_and_seeds_half_known_are_usage_errors(given: list[str]) -> None:
    """Told before anything is trained."""
    with pytest.raises(SystemExit, match="2"):
        command.main(given)
