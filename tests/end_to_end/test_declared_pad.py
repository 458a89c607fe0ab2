"""A pad token that a folder declares and its model has no embedding for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import small_run

from qlora_hal.demo import model_path


@pytest.mark.fault("D09")
def test_a_run_pads_with_a_token_that_the_model_has(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_path(), tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "pad_token": "<new pad>"}), encoding="utf-8")
    result = small_run(tmp_path / "run", {"model.name_or_path": str(folder), "training.max_steps": 1})
    assert result.steps == 1
    assert "the tokenizer's pad token has id" in (tmp_path / "run" / "run.json").read_text("utf-8")
