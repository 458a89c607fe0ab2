"""Where transformers 4 and 5 differ, and nothing else: the rest of the family writes as if there were only 5.

Major 5 is what the family is made for. Major 4 is here because auto-gptq 0.7.1 imports names that 5 no longer has.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_hal.errors import ModelError
from qlora_hal.model.weight_files import read_json


@contextmanager
def optional_libraries_unheard() -> Iterator[None]:
    """Where torchao is installed, transformers imports it with its model classes, and it tells of kernels for other
    machines that it could not load: four lines on stderr that look like errors and are none."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises ModelError QH-M51 when an older transformers cannot express it."""
    from transformers import AutoConfig

    if _major() >= 5:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config, where = read_json(folder / "config.json"), str(folder)
    renamed = older_names(config, where=where)
    renamed |= older_length({**config, **renamed}, where=where)
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **renamed)


def older_names(config: Mapping[str, object], *, where: str) -> dict[str, object]:
    """What transformers 5 writes as `rope_parameters`, in the names that 4 reads; 4 would fall back to its defaults
    without a word."""
    text = config.get("text_config")
    nested = isinstance(text, dict) and "rope_parameters" in text
    rotary = config.get("rope_parameters")
    if rotary is None and not nested:
        return {}
    if nested or not isinstance(rotary, dict) or "rope_theta" not in rotary:
        raise ModelError(
            "QH-M51",
            "config.json describes rotary positions for several kinds of layers (rope_parameters), which this version "
            "of transformers has no names for.",
            where=where,
            fix="Use an environment with transformers 5.",
        )
    scaling = {name: value for name, value in rotary.items() if name not in ("rope_theta", "partial_rotary_factor")}
    names = {"rope_theta": rotary["rope_theta"]}
    names["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "partial_rotary_factor" in rotary:
        names["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    return names


def older_length(config: Mapping[str, object], *, where: str) -> dict[str, object]:
    """The longest length with which transformers 4 stretches rotary positions by the factor that is written down. For
    YaRN it takes the longest length over the original one in its place, which 5 does only where no factor is written.

    Raises ModelError QH-M51 where there is no such length.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or "yarn" not in (scaling.get("rope_type"), scaling.get("type")):
        return {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not isinstance(original, int):
        return {}
    longest = factor * original
    if longest != int(longest):
        raise ModelError(
            "QH-M51",
            f"config.json stretches {original} rotary positions by {factor:g} (YaRN), which this version of "
            "transformers cannot be told.",
            where=where,
            fix="Use an environment with transformers 5.",
        )
    return {"max_position_embeddings": int(longest)}


def build_causal(config: Any, *, dtype: torch.dtype, attention: str | None, trust_remote_code: bool) -> Any:
    """The architecture with parameters of `dtype`. Raises ValueError, as transformers does, for an unknown one."""
    from transformers import AutoModelForCausalLM

    named = {"dtype" if _major() >= 5 else "torch_dtype": dtype}
    with _no_initialization():
        causal = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=trust_remote_code, **named
        )
    _limit_gates(causal, config.get_text_config())
    return causal


def _limit_gates(causal: Any, config: Any) -> None:
    """gpt-oss's gates stop at `swiglu_limit`; transformers 5.17 has 7.0 in its code, whatever config.json says."""
    if getattr(config, "swiglu_limit", None) is None:
        return
    for module in causal.modules():
        if isinstance(getattr(module, "limit", None), float):
            module.limit = float(config.swiglu_limit)


@dataclass(frozen=True, slots=True)
class NameInModel:
    """Where a stored tensor goes. `is_converted`: it is not taken as it is, but joined with others or split, by these
    `operations`; `place` is its own among the kinds of tensors that are joined."""

    name: str
    is_converted: bool = False
    place: int = 0
    operations: tuple[str, ...] = ()


def tensor_renamer(causal: Any, names: Iterable[str]) -> Callable[[str], NameInModel]:
    """How transformers finds the place of a stored tensor in this model, whose tensors are `names`: by its table of
    names (5.x: `conversion_mapping`), and with or without the prefix of the base model."""
    known, prefix = dict.fromkeys(names, True), causal.base_model_prefix
    if _major() < 5:
        return lambda stored: NameInModel(_with_prefix(stored, prefix, known))
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(causal)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(stored: str) -> NameInModel:
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, pattern = rename_source_key(stored, [], [], prefix, known)
        if pattern is None:
            return NameInModel(name)
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        operations = tuple(type(operation).__name__ for operation in converter.operations)
        return NameInModel(name, True, list(converter.source_patterns).index(pattern), operations)

    return rename


def _with_prefix(stored: str, prefix: str, known: Mapping[str, bool]) -> str:
    """A checkpoint of the base model alone lacks the prefix, and the other way round."""
    shorter = stored.removeprefix(f"{prefix}.")
    return next((name for name in (stored, f"{prefix}.{stored}", shorter) if name in known), stored)


def stays_float32(causal: Any) -> Callable[[str], bool]:
    """Whether a parameter, by its name, stays in float32 whatever the model computes in (transformers,
    `PreTrainedModel._get_dtype_plan`)."""
    words = getattr(causal, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(word.replace("*", ".*")) for word in words]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def recomputable_layers(causal: Any) -> list[Any]:
    """The outermost layers that transformers itself would recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = [(name, layer) for name, layer in causal.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    paths = [f"{name}." for name, _ in named]
    return [layer for name, layer in named if not any(f"{name}." != path and name.startswith(path) for path in paths)]


def new_cache(config: Any) -> Any:
    """An empty key-value cache."""
    from transformers import DynamicCache

    return DynamicCache(config=config) if _major() >= 5 else DynamicCache()


def cache_argument(model: Any) -> str:
    """What a model's forward pass calls its key-value cache: `cache` since 5.24, where the older name only warns."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def _no_initialization() -> Iterator[None]:
    module = importlib.import_module(f"transformers.{'initialization' if _major() >= 5 else 'modeling_utils'}")
    with module.no_init_weights():
        yield


def _major() -> int:
    import transformers

    return int(transformers.__version__.partition(".")[0])
