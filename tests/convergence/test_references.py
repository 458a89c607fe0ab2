"""The kept references: 20 seeds of each model and task, and of the very rows and weights that are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.demo import model_path
from qlora_hal_conformance.catalogue import suite_hash
from qlora_hal_conformance.convergence.comparison import SETTINGS
from qlora_hal_conformance.convergence.models import read_model
from qlora_hal_conformance.convergence.references import FOLDER, References, read_references, write_references
from qlora_hal_conformance.convergence.tasks import TASKS, tokenized
from qlora_hal_conformance.convergence.training import Plan

KEPT = sorted(FOLDER.glob("*.json"))
PAGE = Path(__file__).parents[2] / "docs" / "convergence.md"


def document_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def references_of(path: Path) -> References:
    stored = document_of(path)["quantization"]
    format_name, block = WeightFormat(stored["weight_format"]), stored["block_size"]
    return read_references(path, Quantization(format_name, block, stored["double_quant"]))


def test_references_of_the_demo_are_kept() -> None:
    assert "demo_nf4.json" in [path.name for path in KEPT]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_each_task_has_twenty_seeds_and_their_figures(path: Path) -> None:
    document, references = document_of(path), references_of(path)
    assert references.tasks.keys() == TASKS.keys()
    for name, task in references.tasks.items():
        losses = list(task.losses.values())
        assert list(task.losses) == list(range(20))
        assert document["tasks"][name]["mean"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert document["tasks"][name]["standard_deviation"] == pytest.approx(np.std(losses, ddof=1), rel=1e-12)
        assert max(losses) < task.before
        assert task.settings == SETTINGS[references.model, name]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_references_say_what_made_them(path: Path) -> None:
    made_by = document_of(path)["made_by"]
    assert made_by["command"].startswith("python -m qlora_hal_conformance.convergence --make-references")
    assert made_by["compute_dtype"] == "float32"
    assert made_by["device"]
    assert made_by["versions"]["torch"]


@pytest.mark.parametrize("path", [path for path in KEPT if path.stem.startswith("demo_")], ids=lambda path: path.stem)
def test_references_of_the_demo_are_of_the_rows_and_weights_that_are_here(path: Path, tmp_path: Path) -> None:
    references = references_of(path)
    assert references.model_sha256 == read_model("demo", tmp_path).sha256
    for name, task in references.tasks.items():
        assert Plan(tokenized(TASKS[name](), model_path()), task.settings).sha256() == task.data_sha256


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    references = references_of(FOLDER / "demo_nf4.json")
    write_references(references, tmp_path / "again.json")
    assert read_references(tmp_path / "again.json", references.quantization) == references


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_page_holds_mean_and_spread_of_each_task(path: Path) -> None:
    page, references = PAGE.read_text(encoding="utf-8"), references_of(path)
    stored = references.quantization
    for name, task in references.tasks.items():
        what = f"| {references.model} | {name} | `{stored.weight_format.value}`, {stored.block_size} "
        assert f"{what}| {task.before:.4f} | {task.mean:.4f} | {task.standard_deviation:.4f} |" in page


def test_references_decide_no_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hash of the suite does not see this package."""
    from qlora_hal_conformance import catalogue

    for name in ("convergence/judging.py", "sections/test_30_forward.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert suite_hash()
    assert [name for name, _ in catalogue._sources("", tmp_path)] == ["sections/test_30_forward.py"]
