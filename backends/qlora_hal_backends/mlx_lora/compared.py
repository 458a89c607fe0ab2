"""Where mlx-lm's models compute something else than transformers': found by comparing them, one key of config.json at a
time, on tiny models. `compared.json` is written by `python benchmarks/mlx_architectures.py --write-findings`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.config_reading import Config, as_transformers_reads


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one kind of model. `differs` says what is computed otherwise, whatever config.json holds. `left_out` are keys
    that mlx-lm's model takes no notice of, or that it folds into weights, where an adapter misses them; `rope_types`
    are scalings of rotary position that it does not know."""

    differs: str = ""
    left_out: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = field(default=())


@cache
def findings() -> Mapping[str, Finding]:
    """By `model_type`; one that is not here was not compared."""
    found = json.loads((files(__package__) / "compared.json").read_text(encoding="utf-8"))
    return {
        name: Finding(one.get("differs", ""), tuple(one.get("left_out", ())), tuple(one.get("rope_types", ())))
        for name, one in found["models"].items()
    }


def check_compared(source: ModelSource, read: Config) -> tuple[str, ...]:
    """Notes for the user. Raises ModelError QH-M51 where mlx-lm would compute something else than config.json, which
    transformers has `read`, asks for."""
    if asked := _sees_what_follows(source.facts.config, read):
        raise _not_causal(source, asked)
    found = findings().get(source.facts.model_type)
    if found is None:
        return (f"{source.facts.architecture or source.facts.model_type}: its logits in mlx-lm were not compared with "
                "those of transformers for every key of config.json.",)  # fmt: skip
    if found.differs:
        raise _refused(source, f"It computes something else than transformers: {found.differs}.")
    if wrong := [*_left_out(source.facts.config, read, found), *_unknown_scaling(read, found)]:
        raise _refused(source, f"It ignores, for the model or for its adapter: {', '.join(wrong)}.")
    return ()


def _left_out(config: Config, read: Config, found: Finding) -> list[str]:
    meant = text_config(read)
    return [
        f"{key} = {json.dumps(meant[key])[:60]}"
        for key in found.left_out
        if key in text_config(config) and meant.get(key) != _where_absent(config, key)
    ]


def _where_absent(config: Config, key: str) -> object:
    without = {name: value for name, value in config.items() if name != key}
    if isinstance(nested := without.get("text_config"), Mapping):
        without["text_config"] = {name: value for name, value in nested.items() if name != key}
    return text_config(as_transformers_reads(without)).get(key)


def _unknown_scaling(read: Config, found: Finding) -> list[str]:
    rope: Any = text_config(read).get("rope_parameters") or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    asked = {str(part.get("rope_type", "default")) for part in kinds}
    return [f"rope_type = {kind}" for kind in found.rope_types if kind in asked]


def _sees_what_follows(config: Config, read: Config) -> str:
    """What config.json says where a token sees those that come after it; mlx-lm's masks are causal all the same. The
    first key is heeded by transformers' masks, and declared by no class of theirs."""
    if text_config(config).get("is_causal") is False:
        return "is_causal = false"
    return "use_bidirectional_attention = true" if text_config(read).get("use_bidirectional_attention") is True else ""


def _not_causal(source: ModelSource, asked: str) -> ModelError:
    return ModelError(
        "QH-M51",
        f"{source.facts.architecture or source.facts.model_type} is not a causal language model.",
        where=source.name,
        cause=f"config.json has {asked}: a token sees those that come after it, which it should predict.",
        fix="Choose a decoder-only causal language model.",
    )


def _refused(source: ModelSource, cause: str) -> ModelError:
    return ModelError(
        "QH-M51",
        f"mlx-lm's model of {source.facts.architecture or source.facts.model_type} does not compute what this "
        "config.json asks for.",
        where=source.name,
        cause=cause,
        fix="Choose another backend for this model.",
    )
