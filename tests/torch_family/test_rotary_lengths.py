"""A row's loss does not depend on the rows beside it, where rotary factors depend on the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model
from trainers import OpenTrainer, packed, random_batch, source_of

from qlora_hal.contract.rotary_length import RotaryLength
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.torch_family.outline import outline

Opened = Callable[..., OpenTrainer]
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [2.0 + 0.3 * pair for pair in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}


def long_model(folder: Path) -> Path:
    return write_model(folder, "phi3", rope_parameters=LONG, original_max_position_embeddings=16)


def dynamic_model(folder: Path) -> Path:
    return write_model(folder, "llama", rope_parameters=DYNAMIC, max_position_embeddings=16)


def test_the_outline_tells_the_length(tmp_path: Path) -> None:
    assert outline(source_of(long_model(tmp_path / "long")), {}).rotary == RotaryLength("longrope", 16)
    assert outline(source_of(dynamic_model(tmp_path / "dynamic")), {}).rotary == RotaryLength("dynamic", 16)
    assert outline(source_of(write_model(tmp_path / "plain", "llama")), {}).rotary is None


@pytest.mark.fault("B62")
@pytest.mark.parametrize("make", [long_model, dynamic_model])
def test_rows_on_both_sides_of_the_original_length_are_refused(
    make: Callable[[Path], Path], tmp_path: Path, opened: Opened
) -> None:
    trainer = opened(make(tmp_path))
    mixed = random_batch(3, time=24, padding=12)
    for use in (trainer.trainer.logits, trainer.trainer.token_losses, lambda batch: trainer.step([batch])):
        with pytest.raises(UnsupportedFeatureError, match="16 tokens") as caught:
            use(mixed)
        assert caught.value.code == "QH-B62"


@pytest.mark.parametrize(("make", "time"), [(long_model, 12), (long_model, 20), (dynamic_model, 16)])
def test_rows_on_one_side_have_the_loss_that_each_has_alone(
    make: Callable[[Path], Path], time: int, tmp_path: Path, opened: Opened
) -> None:
    trainer = opened(make(tmp_path)).trainer
    batch = random_batch(4, time=time)
    alone = np.concatenate([trainer.logits(one) for one in (row(batch, 0), row(batch, 1))])
    together = trainer.logits(batch)
    in_one_row = trainer.logits(packed([batch])).reshape(alone.shape)
    # Sums in another order: 1e-5 of the largest, as for two programs of the same products.
    for found in (together, in_one_row):
        assert np.abs(found - alone).max() <= 1e-5 * np.abs(alone).max()


def row(batch: Any, index: int) -> Any:
    fields = ("input_ids", "labels", "position_ids", "segment_ids")
    return type(batch)(*(getattr(batch, name)[index : index + 1] for name in fields))
