"""A configuration of mlx-lm, imported and trained here, beside mlx-lm itself: the adapter's scale, the first loss."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.datasets import ChatDataset
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from qlora_hal import train
from qlora_hal.config.other_tools.importing import Imported, imported
from qlora_hal.config.resolve import nest
from qlora_hal.demo import data_path, model_path
from qlora_hal.report.console import RunConsole

LENGTH, ROWS = 32, 4
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, object]]:
    """Rows that are cut at LENGTH: mlx-lm counts one padding token behind every row that is shorter than its batch."""
    lines = data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = sorted(lines[:40], key=len)[-ROWS:]
    (tmp_path / "train.jsonl").write_text("".join(chosen), encoding="utf-8")
    return [json.loads(line) for line in chosen]


@pytest.fixture
def configuration(rows: list[dict[str, object]], tmp_path: Path) -> Imported:
    values = {
        **{"model": str(model_path()), "data": str(tmp_path), "fine_tune_type": "lora", "num_layers": -1},
        **{"batch_size": ROWS, "iters": 1, "max_seq_length": LENGTH, "adapter_path": str(tmp_path / "run")},
        "lora_parameters": LORA,
    }
    file = tmp_path / "lora_config.json"
    file.write_text(json.dumps(values))
    return imported(file)


@pytest.mark.slow
def test_scale_and_first_loss_are_those_of_mlx_lm(configuration: Imported, rows: list[dict[str, object]]) -> None:
    settings = nest(configuration.settings)
    assert isinstance(lora := settings["lora"], dict)
    assert lora["alpha"] / lora["r"] == LORA["scale"]
    mlx = {"backend": {"name": "mlx_lora", "options": {"compile": "off"}}}
    ours = train({**settings, **mlx}, console=RunConsole(quiet=True)).losses[0][1]

    model, tokenizer = load(str(model_path()))
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, -1, LORA)
    assert {module.scale for _, module in model.named_modules() if hasattr(module, "lora_a")} == {LORA["scale"]}
    data = ChatDataset(rows, tokenizer, mask_prompt=False)
    tokens = [data.process(row)[0][:LENGTH] for row in rows]
    assert {len(row) for row in tokens} == {LENGTH}
    theirs, counted = default_loss(model, mx.array(tokens), mx.array([[0, LENGTH]] * ROWS))
    assert counted.item() == ROWS * (LENGTH - 1)
    # Means of 124 losses of about 5, each of two float32 programs that add in another order (mlx_models.FLOAT32).
    assert ours == pytest.approx(theirs.item(), abs=1e-4)
