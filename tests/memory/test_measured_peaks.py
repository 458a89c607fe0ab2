"""The estimate beside the peaks that an NVIDIA H200's allocator had, for every choice of what is kept where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.memory.gpus import known_gpu
from qlora_hal.run.planned_memory import PlannedModel
from tests.memory.configs import write_config

RECORD = Path(__file__).parents[2] / "docs" / "runs" / "h200_memory_steps.json"
MEASURED = json.loads(RECORD.read_text(encoding="utf-8"))["found"]
SHAPES: dict[str, dict[str, int]] = {
    "7b": dict(hidden=4096, inner=11008, layers=32, heads=32, key_heads=32, vocabulary=32000),
    "8b": dict(hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256),
    "65b": dict(hidden=8192, inner=22016, layers=80, heads=64, key_heads=64, vocabulary=32000),
}
MOST_BELOW, MOST_ABOVE = -0.03, 0.12
"""What the planner is to keep to without a probe: a run that was said to fit has to."""


def asked(row: dict[str, Any]) -> tuple[str, list[str], str]:
    """Recomputation, what is on the host, and the optimizer, as the benchmark names them."""
    recompute, *others = row["choice"].split(", ")
    on_host = [part.removeprefix("host: ").split("+") for part in others if part.startswith("host: ")]
    return recompute, on_host[0] if on_host else [], others[-1]


@pytest.mark.parametrize("row", MEASURED, ids=[f"{row['row']}-{row['length']}-{row['choice']}" for row in MEASURED])
def test_a_measured_peak_was_foreseen(row: dict[str, Any], tmp_path: Path) -> None:
    shape = row["row"].partition("-")[0]
    write_config(tmp_path / shape, **SHAPES[shape], positions=2**17)
    recompute, on_host, optimizer = asked(row)
    settings = {
        "model": str(tmp_path / shape),
        "quantization.double_quant": True,
        "lora.r": 16,
        "training.per_device_train_batch_size": row["rows"],
        "data.max_seq_length": row["length"],
        "training.recompute": recompute,
        "training.base_offload": on_host,
        "training.optim": optimizer,
    }
    config = resolve_settings(None, keywords=settings, environ={}).config
    memory = PlannedModel.of(config, known_gpu("H200")).estimate()
    # The allocator knows nothing of the context that every process of a device has.
    foreseen = (memory.total - memory.runtime) / 1e9
    assert MOST_BELOW <= foreseen / row["peak_gb"] - 1 <= MOST_ABOVE
