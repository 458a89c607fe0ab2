"""What a run says of its base: settings of config.json that are not followed, layers that only loading could tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import train
from qlora_hal.contract.backend import ModelOutline
from qlora_hal.demo import model_path
from qlora_hal.detect import discovery
from qlora_hal.errors import UnsupportedFeatureError


def demo_model(folder: Path, **changes: object) -> str:
    """The demo's model with another config.json."""
    import shutil

    shutil.copytree(model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_what_config_json_asks_and_is_not_done_stands_in_the_notes_and_in_run_json(tmp_path: Path) -> None:
    asked = {"attention_dropout": 0.1, "quantization_config": {"load_in_8bit": True}}
    settings = {
        "model.name_or_path": demo_model(tmp_path / "model", **asked),
        "training.max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    result = train(merged(SMALL, settings))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for part in ("the base's own dropout is off (attention_dropout 0.1", "(quantization_config: load_in_8bit: true)"):
        assert any(part in note for note in result.notes)
        assert any(part in note for note in record["notes"])
    assert record["resolved"]["base_dropout"] == "off"


def test_layers_that_the_loaded_model_has_otherwise_are_settled_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend without an outline of its own, and headers that tell one layer too many and one too few."""
    outline_of = discovery.outline_of

    def told_wrong(spec: Any, source: Any, options: Any) -> ModelOutline:
        right = outline_of(replace(spec, outline=""), source, options)
        wrong = dict(right.linear_modules)
        wrong["model.layers.0.self_attn.q_norm"] = wrong.pop("model.layers.0.self_attn.q_proj")
        return replace(right, linear_modules=wrong)

    monkeypatch.setattr(discovery, "outline_of", told_wrong)
    result = train(merged(SMALL, {"training.max_steps": 1, "output_dir": str(tmp_path / "run")}))
    assert any("the loaded model has other linear layers than its files describe" in note for note in result.notes)
    targets = json.loads((tmp_path / "run" / "run.json").read_text())["model"]["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in targets
    assert "model.layers.0.self_attn.q_norm" not in targets


def long_rope_settings(tmp_path: Path, original_length: int) -> dict[str, Any]:
    factors = [1.0] * 32
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": factors, "long_factor": factors}
    changes = {"rope_parameters": {**rope, "original_max_position_embeddings": original_length}, "rope_scaling": None}
    return {"model.name_or_path": demo_model(tmp_path / "model", **changes), "output_dir": str(tmp_path / "run")}


def test_rows_on_both_sides_of_a_rotary_length_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    """LongRoPE's factors for a batch are those of its longest row."""
    with pytest.raises(UnsupportedFeatureError, match="one set of factors up to 24 tokens") as caught:
        train(merged(SMALL, long_rope_settings(tmp_path, 24)))
    assert caught.value.code == "QH-B62"


@pytest.mark.parametrize("original_length", [4, 2048], ids=["beyond it", "up to it"])
def test_rows_on_one_side_of_a_rotary_length_are_trained_on(original_length: int, tmp_path: Path) -> None:
    """All of them have the factors that each has alone."""
    assert train(merged(SMALL, long_rope_settings(tmp_path, original_length)), dry_run=True).plan
