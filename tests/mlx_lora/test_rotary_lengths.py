"""A row's loss does not depend on the rows beside it, where rotary factors depend on the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotary_length_models import (
    check_rows_have_the_logits_that_each_has_alone,
    check_rows_on_both_sides_are_refused,
    dynamic_model,
    long_model,
)
from tiny_models import write_model
from trainers import OpenTrainer, packed, random_batch, source_of

from qlora_hal.contract.rotary_length import RotaryLength
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.mlx_lora.outline import outline

Opened = Callable[..., OpenTrainer]


def test_the_outline_tells_the_length(tmp_path: Path) -> None:
    assert outline(source_of(long_model(tmp_path / "long")), {}).rotary == RotaryLength("longrope", 16)
    assert outline(source_of(dynamic_model(tmp_path / "dynamic")), {}).rotary == RotaryLength("dynamic", 16)
    assert outline(source_of(write_model(tmp_path / "plain", "llama")), {}).rotary is None


@pytest.mark.fault("B62")
@pytest.mark.parametrize("make", [long_model, dynamic_model])
def test_rows_on_both_sides_of_the_original_length_are_refused(
    make: Callable[[Path], Path], tmp_path: Path, opened: Opened
) -> None:
    check_rows_on_both_sides_are_refused(opened(make(tmp_path)))


@pytest.mark.parametrize(("make", "time"), [(long_model, 8), (long_model, 20), (dynamic_model, 8)])
def test_rows_on_one_side_have_the_loss_that_each_has_alone(
    make: Callable[[Path], Path], time: int, tmp_path: Path, opened: Opened
) -> None:
    check_rows_have_the_logits_that_each_has_alone(opened(make(tmp_path)), time)


def test_a_packed_row_beyond_the_original_length_is_refused_though_its_samples_are_shorter(
    tmp_path: Path, opened: Opened
) -> None:
    """mlx-lm rotates a packed row as one."""
    trainer = opened(long_model(tmp_path)).trainer
    with pytest.raises(UnsupportedFeatureError, match="rows of 12 and of 24 tokens"):
        trainer.logits(packed([random_batch(4, time=12)]))
