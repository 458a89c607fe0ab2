"""Models whose rotary factors depend on the length of a batch, and what every backend must make of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model
from trainers import OpenTrainer, packed, random_batch

from qlora_hal.errors import UnsupportedFeatureError

LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [2.0 + 0.3 * pair for pair in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}


def long_model(folder: Path) -> Path:
    return write_model(folder, "phi3", rope_parameters=LONG, original_max_position_embeddings=16)


def dynamic_model(folder: Path) -> Path:
    return write_model(folder, "llama", rope_parameters=DYNAMIC, max_position_embeddings=16)


def check_rows_on_both_sides_are_refused(opened: OpenTrainer) -> None:
    mixed = random_batch(3, time=24, padding=12)
    for use in (opened.trainer.logits, opened.trainer.token_losses, lambda batch: opened.step([batch])):
        with pytest.raises(UnsupportedFeatureError, match="16 tokens") as caught:
            use(mixed)
        assert caught.value.code == "QH-B62"


def check_rows_have_the_logits_that_each_has_alone(opened: OpenTrainer, time: int) -> None:
    trainer, batch = opened.trainer, random_batch(4, time=time)
    alone = np.concatenate([trainer.logits(one) for one in (_row(batch, 0), _row(batch, 1))])
    together = trainer.logits(batch)
    in_one_row = trainer.logits(packed([batch])).reshape(alone.shape)
    # Sums in another order: 1e-5 of the largest, as for two programs of the same products.
    for found in (together, in_one_row):
        assert np.abs(found - alone).max() <= 1e-5 * np.abs(alone).max()


def _row(batch: Any, index: int) -> Any:
    fields = ("input_ids", "labels", "position_ids", "segment_ids")
    return type(batch)(*(getattr(batch, name)[index : index + 1] for name in fields))
