"""Numbers in config.json by which no token could be sent to an expert: refused from the headers, by their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drawn_models import write_drawn_model

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import read_facts


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four experts to a block, two to a token."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")}
    for name, folder in folders.items():
        write_drawn_model(folder, name)
    return folders


@pytest.mark.fault("M50")
@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; a whole number from 1 to 4"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("qwen3_moe", {"num_experts_per_tok": -1}, "num_experts_per_tok is -1"),
        ("qwen3_moe", {"num_experts": -4}, "num_experts is -4; a whole number of 1 or more"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("gpt_oss", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("deepseek_v3", {"n_group": 0}, "n_group is 0"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, which does not divide 4 experts"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 3}, "topk_group is 3; a whole number from 1 to 2"),
        ("deepseek_v3", {"n_shared_experts": -1}, "n_shared_experts is -1"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
    ],
)
def test_a_number_without_meaning_is_refused_with_its_key(
    model_type: str, keys: dict[str, Any], words: str, drawn: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((drawn[model_type] / "model.safetensors").read_bytes())
    config = json.loads((drawn[model_type] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_facts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(ModelError, match=words) as refusal:
        read_facts(tmp_path)
    assert refusal.value.code == "QH-M50"


def test_a_model_without_experts_may_say_that_it_has_none(drawn: dict[str, Path], tmp_path: Path) -> None:
    """As dense models of families with experts do (granitemoehybrid)."""
    write_drawn_model(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    none = {"num_local_experts": 0, "num_experts_per_tok": 0}
    (tmp_path / "config.json").write_text(json.dumps({**config, **none}))
    read_facts(tmp_path)
