"""What a run says of where its memory is, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged, small_run

from qlora_hal import train
from qlora_hal.errors import QloraHalError
from qlora_hal.run import planned_memory

pytestmark = pytest.mark.slow

ONE_STEP = {"training.max_steps": 1}


def test_run_says_what_it_chose_and_why_and_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planned_memory, "device_memory", lambda *given: 1)  # nothing fits: the least is taken
    choices = {"training.recompute": "auto", "training.base_offload": "auto"}
    result = small_run(tmp_path / "run", {**ONE_STEP, **choices})
    run = json.loads((result.run_dir / "run.json").read_text(encoding="utf-8"))
    assert run["resolved"]["base_offload"] == [], "the host's memory is the device's"
    assert run["resolved"]["recompute"] == "full"
    assert any("the least there is, but above" in note for note in run["notes"])
    asked = small_run(tmp_path / "asked", {**ONE_STEP, "training.base_offload": ["embeddings", "layers"]})
    run = json.loads((asked.run_dir / "run.json").read_text(encoding="utf-8"))
    assert run["resolved"]["base_offload"] == ["embeddings", "layers"]
    assert any("cross to the device" in note for note in run["notes"])


def test_older_switch_is_translated_and_that_is_said(tmp_path: Path) -> None:
    result = small_run(tmp_path / "run", {**ONE_STEP, "training.gradient_checkpointing": True})
    run = json.loads((result.run_dir / "run.json").read_text(encoding="utf-8"))
    assert run["resolved"]["recompute"] == "full"
    assert "training.gradient_checkpointing true is training.recompute full" in run["notes"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.gradient_checkpointing": True, "training.recompute": "none"}, "contradict each other"),
        ({"parallel.mode": "shard", "training.base_offload": ["layers"]}, "mutually exclusive"),
        ({"training.base_offload": ["experts"]}, "auto, or a list of embeddings, layers, head"),
    ],
)
def test_contradictions_are_found_before_anything_is_read(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(QloraHalError, match="QH-U") as refusal:
        train(merged(SMALL, {**changes, "output_dir": str(tmp_path / "run")}))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "feature"),
    [
        ({"training.recompute": "offload"}, "recomputation_choice"),
        ({"training.base_offload": ["layers"]}, "base_offload"),
    ],
)
def test_backend_without_the_feature_refuses_before_loading(
    setting: dict[str, Any], feature: str, tmp_path: Path
) -> None:
    with pytest.raises(QloraHalError, match=feature) as refusal:
        train(merged(SMALL, {**setting, "backend.name": "mlx_lora", "output_dir": str(tmp_path / "run")}))
    assert refusal.value.code.startswith("QH-B")
