"""Which modules adapter_config.json gives an adapter, by PEFT's rules (peft 0.21, `tuners_utils`,
`check_target_module_exists`). PEFT leaves tensors of any other module out, with a warning."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qlora_hal.adapter.expressions import ExpressionError, matching
from qlora_hal.adapter.peft_experts import left_out
from qlora_hal.adapter.targets import asks_for_all, names_module

_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class PeftTargets:
    """The fields of adapter_config.json that choose modules. A string is an expression over whole paths."""

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, object]) -> PeftTargets:
        """Raises ValueError, with words that complete `adapter_config.json ...`, for fields of another form."""
        return cls(
            _names(config, "target_modules"),
            _names(config, "exclude_modules") or (),
            _numbers(config, "layers_to_transform"),
            _plain_words(config, "layers_pattern"),
            _plain_words(config, "target_parameters"),
        )

    def left_out(self, modules: Collection[str], stacks: Collection[str] = ()) -> list[str]:
        """Those of `modules` that PEFT would give no adapter; none where it chooses by the kind of model. Experts of
        `stacks` have paths of their own. Raises ValueError as `read` does, for an expression without an end."""
        if self.modules is None and not self.parameters:
            return []
        chosen = self._chosen(modules)
        unnamed = [module for module in modules if module not in chosen]
        return left_out(unnamed, stacks, self.parameters) if self.parameters else unnamed

    def _chosen(self, modules: Collection[str]) -> Collection[str]:
        if self.modules is None:
            return frozenset()
        excluded = _meant("exclude_modules", self.excluded, modules)
        if isinstance(self.modules, str) and asks_for_all(self.modules):
            return frozenset(modules) - excluded
        meant = _meant("target_modules", self.modules, modules) - excluded
        if isinstance(self.modules, str) or self.layers is None:
            return meant
        return {module for module in meant if module in self.modules or self._layer_of(module) in self.layers}

    def _layer_of(self, module: str) -> int | None:
        named = (re.compile(rf"(?:^|.*?\.){word}\.(?P<index>\d+)\.") for word in self.layers_pattern)
        found = filter(None, (pattern.match(module) for pattern in (named if self.layers_pattern else [_LAYER])))
        layer = next(found, None)
        return None if layer is None else int(layer["index"])


def _meant(field: str, names: str | tuple[str, ...], modules: Collection[str]) -> frozenset[str]:
    if not isinstance(names, str):
        return frozenset(module for module in modules if any(names_module(name, module) for name in names))
    try:
        return matching(names, modules)
    except ExpressionError as problem:
        raise ValueError(f"has {field} = {names!r:.60}, an expression that {problem}") from problem


def _names(config: Mapping[str, object], field: str) -> str | tuple[str, ...] | None:
    value = config.get(field)
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if not isinstance(value, str):
        raise ValueError(f"has {field} = {value!r:.60}, names or an expression are expected")
    return value


def _numbers(config: Mapping[str, object], field: str) -> tuple[int, ...] | None:
    value = config.get(field)
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"has {field} = {value!r:.60}, layer numbers are expected")
    return tuple(numbers)


def _plain_words(config: Mapping[str, object], field: str) -> tuple[str, ...]:
    value = config.get(field) or []
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and re.fullmatch(r"[\w.]+", word) for word in words):
        raise ValueError(f"has {field} = {value!r:.60}, names such as layers are expected")
    return tuple(words)
