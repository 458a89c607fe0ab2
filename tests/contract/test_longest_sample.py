"""What a backend computes right up to a length: samples count, each alone, and padding does not."""

from __future__ import annotations

import pytest
from trainers import packed, random_batch

from qlora_hal.contract.longest_sample import LongestSample
from qlora_hal.contract.values import Batch
from qlora_hal.errors import UnsupportedFeatureError

LIMIT = LongestSample(12, "the sliding window of 12 tokens of this model")


@pytest.mark.parametrize(
    "batch",
    [
        random_batch(3, rows=1, time=12),
        random_batch(3, rows=1, time=30, padding=18),
        packed([random_batch(3, time=12)]),
    ],
    ids=["a row", "padding", "two samples in a row"],
)
def test_samples_up_to_the_limit_pass_in_rows_of_any_length(batch: Batch) -> None:
    LIMIT.check_batch(batch)


@pytest.mark.parametrize(
    "batch",
    [random_batch(3, time=13), random_batch(3, time=20, padding=7), packed([random_batch(3, time=13)])],
    ids=["a row", "padding", "two samples in a row"],
)
def test_one_token_more_is_refused_with_the_bound(batch: Batch) -> None:
    with pytest.raises(UnsupportedFeatureError, match="longer than the sliding window of 12 tokens") as caught:
        LIMIT.check_batch(batch)
    assert caught.value.code == "QH-B61"
    assert "at most 12" in caught.value.fix
