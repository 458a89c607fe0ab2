"""Where rotary positions change with the length of a row, and which lengths then share a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.rotary_length import RotaryLength, rotary_length
from qlora_hal.contract.values import Batch
from qlora_hal.errors import UnsupportedFeatureError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"rope_parameters": None}, None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, None),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16}},
            RotaryLength("longrope", 16),
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 16},
            RotaryLength("longrope", 16),
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 32},
            RotaryLength("dynamic", 32),
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            RotaryLength("longrope", 16),
        ),
    ],
)
def test_the_length_is_the_one_that_the_configuration_names(
    config: dict[str, Any], expected: RotaryLength | None
) -> None:
    assert rotary_length(config) == expected


@pytest.mark.parametrize(
    ("kind", "shortest", "longest", "fits"),
    [
        ("longrope", 3, 16, True),
        ("longrope", 17, 90, True),
        ("longrope", 16, 17, False),
        ("dynamic", 3, 16, True),
        ("dynamic", 17, 17, False),  # transformers keeps the factors of the longest row it has seen
    ],
)
@pytest.mark.fault("B62")
def test_rows_are_served_where_all_of_them_turn_by_the_same_factors(
    kind: str, shortest: int, longest: int, fits: bool
) -> None:
    rotary = RotaryLength(kind, 16)
    if fits:
        rotary.check(shortest, longest)
        return
    with pytest.raises(UnsupportedFeatureError, match=f"{kind}.* 16 tokens.*{longest} tokens") as caught:
        rotary.check(shortest, longest)
    assert caught.value.code == "QH-B62"
    assert caught.value.fix.startswith("Set data.max_seq_length to at most 16")


def test_padding_counts_as_the_backend_sees_it_and_is_no_sample() -> None:
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    batch = Batch(segments, segments, segments, segments)
    RotaryLength("longrope", 4).check_batch(batch, seen=4)
    with pytest.raises(UnsupportedFeatureError, match="rows of 2 and of 6 tokens"):
        RotaryLength("longrope", 4).check_batch(batch, seen=6)
