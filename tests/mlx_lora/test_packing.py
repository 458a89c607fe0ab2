"""A packed row holds samples that are computed as alone, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn_models import write_drawn_model
from mlx_models import FLOAT32
from tiny_models import write_model
from trainers import OpenTrainer, packed, random_batch

from qlora_hal.errors import UnsupportedFeatureError

Opened = Callable[..., OpenTrainer]


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3", "phi", "gpt_neox"))]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_samples_have_the_logits_that_they_have_alone(
    family: str, checkpointing: bool, tmp_path: Path, opened: Opened
) -> None:
    trainer = opened(write_model(tmp_path, family), checkpointing=checkpointing).trainer
    batch = random_batch(4, time=12)
    apart = trainer.logits(batch).reshape(1, 24, -1)
    assert np.abs(trainer.logits(packed([batch])) - apart).max() <= FLOAT32 * np.abs(apart).max()


def hunyuan(folder: Path) -> Path:
    """It norms queries and keys after they were rotated."""
    write_drawn_model(folder, "hunyuan_v1_dense", {}, seed=1)
    return folder


def with_learned_positions(folder: Path) -> Path:
    """They go on in a packed row."""
    return write_model(folder, "gpt_bigcode")


@pytest.mark.fault("B60")
@pytest.mark.parametrize("make", [hunyuan, with_learned_positions])
def test_packed_rows_are_refused_where_more_than_the_distance_of_tokens_counts(
    make: Callable[[Path], Path], tmp_path: Path, opened: Opened
) -> None:
    ready = opened(make(tmp_path))
    with pytest.raises(UnsupportedFeatureError, match="Packing is not possible") as caught:
        ready.step([packed([random_batch(4)])])
    assert caught.value.code == "QH-B60"
    assert ready.step([random_batch(4)]).loss > 0


def test_without_the_name_the_trial_tells_that_a_sample_is_another_behind_others(
    tmp_path: Path, opened: Opened
) -> None:
    ready = opened(hunyuan(tmp_path))
    ready.trainer._base.architecture = "unknown"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedFeatureError, match="other logits behind another one"):
        ready.trainer.logits(packed([random_batch(4)]))
