"""Sliding-window attention that a checkpoint asks for and mlx-lm's model of it leaves out.

Rows that are no longer than the window are the same either way. For longer ones the window is put into the mask where
all layers have it; where only some have it, they are refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource

_ON_EVERY_LAYER = frozenset({"mistral", "phi3", "starcoder2"})
"""Model types whose layers all slide, in transformers 5."""


@dataclass(frozen=True, slots=True)
class MissingWindow:
    """`tokens` None: mlx-lm does all that the checkpoint asks for."""

    tokens: int | None = None
    on_every_layer: bool = False
    architecture: str = ""

    def applied_to(self, time: int) -> int | None:
        """The window to put into the mask of rows of `time` tokens. Raises UnsupportedFeatureError QH-B61."""
        if self.tokens is None or time <= self.tokens:
            return None
        if self.on_every_layer:
            return self.tokens
        raise self._too_long(time)

    def check_generation(self, time: int) -> None:
        """Raises UnsupportedFeatureError QH-B61: a key-value cache of mlx-lm keeps every token in sight."""
        if self.tokens is not None and time > self.tokens:
            raise self._too_long(time)

    def _too_long(self, time: int) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            "QH-B61",
            f"{time} tokens are longer than the sliding window of {self.tokens} tokens of {self.architecture}, which "
            "mlx-lm leaves out.",
            fix=f"Keep to {self.tokens} tokens (data.max_seq_length), or choose another backend.",
        )


def missing_window(source: ModelSource, arguments_class: type[Any]) -> MissingWindow:
    config = text_config(source.facts.config)
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return MissingWindow()
    known = inspect.signature(arguments_class).parameters
    model_type = source.facts.model_type
    # mlx-lm serves Mistral by its Llama, which slides only where `layer_types` says so.
    served = "sliding_window" in known and not (model_type == "mistral" and "layer_types" not in config)
    if served:
        return MissingWindow()
    return MissingWindow(window, model_type in _ON_EVERY_LAYER, source.facts.architecture or model_type)
