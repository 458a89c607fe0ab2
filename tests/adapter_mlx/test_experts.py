"""Adapters on stacks of experts, between PEFT's files and mlx-lm's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_mlx.both_tools import logits_in_mlx, logits_in_peft, random_adapter, save_for_peft, train_in_mlx
from drawn_models import write_drawn_model

from qlora_hal.adapter import read_adapter, read_mlx_adapter, write_adapter, write_mlx_adapter
from qlora_hal.model.facts import read_facts

MIXTURES = ["mixtral", "qwen3_moe"]
# peft 0.21 looks for the patterns among modules alone, and says that it found none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def drawn_base(folder: Path, model_type: str) -> None:
    """With the keys of config.json that mlx-lm reads and transformers 5 names otherwise."""
    model = write_drawn_model(folder, model_type)
    config = json.loads((folder / "config.json").read_text())
    older = {
        "num_experts": config["num_local_experts"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": model.config.rope_parameters["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps({**older, **config}))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mlx_lm_and_peft_open_it_with_the_same_logits(model_type: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    drawn_base(base, model_type)
    adapter = random_adapter(base, dropout=0.0)
    peft_folder = save_for_peft(tmp_path / "peft", adapter, base)
    write_mlx_adapter(
        tmp_path / "mlx",
        adapter,
        base_name=str(base),
        base_revision=None,
        provenance={},
        linear_modules=read_facts(base).linear_modules,
    )
    plain, expected = logits_in_peft(base, None), logits_in_peft(base, peft_folder)
    found = logits_in_mlx(base, tmp_path / "mlx")
    moved = np.abs(expected - plain).max()
    assert np.abs(found - expected).max() < 1e-3 * moved, "both are sums in float32, in another order"


@pytest.mark.parametrize("model_type", MIXTURES)
def test_what_mlx_lm_trained_opens_in_peft(model_type: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    drawn_base(base, model_type)
    keys = {name.rpartition(".layers.")[2].partition(".")[2] for name in _switches(base)}
    folder = train_in_mlx(base, tmp_path / "mlx", num_layers=-1, keys=sorted(keys))
    adapter = read_mlx_adapter(folder, read_facts(base).linear_modules)
    assert any(tensor.ndim == 3 for tensor in adapter.tensors.values())
    write_adapter(tmp_path / "peft", adapter, base_name=str(base), base_revision=None, provenance={})
    expected, found = logits_in_mlx(base, folder), logits_in_peft(base, tmp_path / "peft")
    moved = np.abs(expected - logits_in_mlx(base, None)).max()
    assert np.abs(found - expected).max() < 1e-3 * moved
    back = read_adapter(tmp_path / "peft")
    assert all(np.array_equal(back.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def _switches(base: Path) -> list[str]:
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    return [name for name, module in model.named_modules() if isinstance(module, SwitchLinear)]
