"""Which modules adapter_config.json gives an adapter, by mlx-lm's rules (mlx-lm 0.32.2, `linear_to_lora_layers`).

mlx-lm refuses an adapter with tensors of any other module; its versions up to 2025 left them out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_PLACE = re.compile(r"model\.layers\.(\d+)\.([\w.-]+)")
"""Paths that Hugging Face and mlx-lm write alike: layer number, name within the layer."""


def place_of(module: str) -> tuple[int, str] | None:
    """(layer number, name within the layer); None outside `model.layers`."""
    place = _PLACE.fullmatch(module)
    return (int(place[1]), place[2]) if place else None


def layers_of(modules: Collection[str]) -> list[int]:
    """Numbers of the layers that these modules are in, ascending."""
    return sorted({place[0] for module in modules if (place := place_of(module))})


@dataclass(frozen=True, slots=True)
class MlxTargets:
    """`keys`, None for every linear layer, and how many layers they are looked for in, from the last one; 0 for all."""

    keys: frozenset[str] | None
    last_layers: int

    @classmethod
    def read(cls, config: Mapping[str, object], parameters: Mapping[str, object]) -> MlxTargets:
        """Raises ValueError, with words that complete `adapter_config.json ...`, for fields of another form."""
        return cls(_keys(parameters.get("keys")), _last_layers(config))

    def left_out(self, modules: Collection[str], linear_modules: Collection[str] | None) -> list[str]:
        """Those of `modules` that mlx-lm would give no adapter. Without the model's `linear_modules` the highest layer
        of the adapter stands for the last: were there more, more would be left out."""
        last = max(layers_of(linear_modules or modules), default=0)
        first = last + 1 - self.last_layers if self.last_layers else 0
        return [module for module in modules if not self._chooses(module, first)]

    def _chooses(self, module: str, first: int) -> bool:
        if self.keys is not None and module in self.keys:
            return True
        place = place_of(module)
        return place is not None and place[0] >= first and (self.keys is None or place[1] in self.keys)


def _keys(value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"has keys = {value!r:.60}, a list of names is expected")
    return frozenset(value)


def _last_layers(config: Mapping[str, object]) -> int:
    """`num_layers`, which the first versions called `lora_layers`; a negative number means all."""
    field = "num_layers" if "num_layers" in config else "lora_layers"
    value = config.get(field, -1)
    if type(value) is not int:
        raise ValueError(f"has {field} = {value!r:.60}, a whole number is expected")
    return max(value, 0)
