"""Sliding-window attention that a checkpoint asks for and mlx-lm's model of it leaves out.

Rows that are no longer than the window are the same either way. For longer ones the window is put into the mask where
all layers have it; where only some have it, they are refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from qlora_hal.contract.longest_sample import LongestSample
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.config_reading import Config


@dataclass(frozen=True, slots=True)
class MissingWindow:
    """`tokens` None: mlx-lm does all that the checkpoint asks for."""

    tokens: int | None = None
    on_every_layer: bool = False
    architecture: str = ""

    def notes(self) -> tuple[str, ...]:
        """Sentences for the user, before any row is seen."""
        if self.tokens is None or self.on_every_layer:
            return ()
        return (
            f"mlx-lm ignores the sliding window of {self.tokens} tokens that some layers of {self.architecture} "
            "have: longer rows are refused (QH-B61)",
        )

    @property
    def longest_sample(self) -> LongestSample | None:
        """None where samples of every length are computed right."""
        if self.tokens is None or self.on_every_layer:
            return None
        return LongestSample(self.tokens, self._bound)

    def applied_to(self, time: int) -> int | None:
        """The window to put into the mask of rows of `time` tokens, where all layers have it."""
        return self.tokens if self.on_every_layer and self.tokens is not None and time > self.tokens else None

    def check_generation(self, time: int) -> None:
        """Raises UnsupportedFeatureError QH-B61: a key-value cache of mlx-lm keeps every token in sight."""
        if self.tokens is not None and time > self.tokens:
            raise self.too_long(time)

    def too_long(self, time: int) -> UnsupportedFeatureError:
        """For rows that the window cannot be put into."""
        return UnsupportedFeatureError(
            "QH-B61",
            f"{time} tokens are longer than {self._bound}.",
            fix=f"Keep to {self.tokens} tokens (data.max_seq_length), or choose another backend.",
        )

    @property
    def _bound(self) -> str:
        return f"the sliding window of {self.tokens} tokens of {self.architecture}, which mlx-lm ignores"


def missing_window(source: ModelSource, read: Config, arguments_class: type[Any]) -> MissingWindow:
    """`read`: config.json as transformers reads it. There layers slide where `layer_types` says so; kinds of model
    without layer types slide on all layers."""
    config = text_config(read)
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return MissingWindow()
    kinds = config.get("layer_types")
    slides = None if kinds is None else [kind == "sliding_attention" for kind in kinds]
    if slides is not None and not any(slides):
        return MissingWindow()
    known = inspect.signature(arguments_class).parameters
    # Where mlx-lm's model knows kinds of layers (its Llama, which Mistral is built by), it slides on those named.
    served = "text_config" in known or ("sliding_window" in known and not ("layer_types" in known and slides is None))
    if served:
        return MissingWindow()
    return MissingWindow(window, slides is None or all(slides), source.facts.architecture or source.facts.model_type)
