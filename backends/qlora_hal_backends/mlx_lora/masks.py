"""Attention masks that mlx-lm does not make: of packed rows, and of a sliding window on every layer.

mlx-lm's models ask the cache of each layer for the attention mask, and hand it keys and values. A cache that stores
nothing and answers with a mask of its own therefore masks any of them, with no code of theirs replaced. Positions of
packed samples do not restart: rotary attention depends on the distance of two tokens alone, in all but a few models,
which `step.check_can_share_rows` finds.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlora_hal.errors import UnsupportedFeatureError


class MaskingCache:
    """The place of a layer's cache for one batch. `segments` `[batch, time]` keeps packed samples apart; `window` is
    how many tokens back, itself included, a token sees where the model names no window of its own."""

    offset = 0

    def __init__(self, segments: mx.array | None, window: int | None) -> None:
        self._segments = segments
        self._window = window
        self.was_used = False

    def make_mask(self, time: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """`[batch or 1, 1, time, time]`, true where the row's token sees the column's."""
        window_size = window_size or self._window
        places = mx.arange(time)
        seen = places[:, None] >= places[None]
        if window_size is not None:
            seen = seen & (places[:, None] < places[None] + window_size)
        if self._segments is None:
            return seen[None, None]
        same = self._segments[:, :, None] == self._segments[:, None, :]
        return (seen[None] & same)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.was_used = True
        return keys, values


def check_all_used(caches: list[Any], architecture: str) -> None:
    """Raises UnsupportedFeatureError where a layer did not attend through its cache: its samples would mix."""
    unused = sum(not cache.was_used for cache in caches)
    if unused:
        raise UnsupportedFeatureError(
            "QH-B60",
            f"Packing is not possible with {architecture}: {unused} of {len(caches)} layers are not attention layers.",
            cause="State carried over from one sample into the next would mix them.",
            fix="Set data.packing false.",
        )
