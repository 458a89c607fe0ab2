"""From a Hugging Face config.json to mlx-lm's model of it, still without weights.

mlx-lm reads config.json with defaults of its own, and it does not know all names of transformers 5: what it would get
silently wrong is translated here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.activations import put_activations_right
from qlora_hal_backends.mlx_lora.sliding import MissingWindow, missing_window

_MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_NO_MODELS = frozenset({"activations", "base", "cache", "pipeline", "rope_utils", "switch_layers"})


def build_model(source: ModelSource) -> tuple[Any, MissingWindow]:
    """mlx-lm's model for this checkpoint, and what it leaves out; its parameters are lazy and take no memory.

    Raises ModelError QH-M51 for an architecture that mlx-lm lacks or cannot build from this config.json.
    """
    model_class, arguments_class = _classes(source)
    config = translated_config(source.facts.config, source.facts.tensors, arguments_class)
    try:
        causal = model_class(arguments_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError) as error:
        raise _cannot_build(source, f"{type(error).__name__}: {error}") from error
    put_activations_right(causal, source)
    return causal, missing_window(source, arguments_class)


def _classes(source: ModelSource) -> tuple[Any, Any]:
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

    model_type, architecture = source.facts.model_type, source.facts.architecture
    name = MODEL_ARCHITECTURE_REMAPPING.get((model_type, architecture)) or MODEL_REMAPPING.get(model_type, model_type)
    # The name comes from a file: nothing but a module of mlx_lm.models may be imported by it.
    if not _MODULE_NAME.fullmatch(name) or name in _NO_MODELS:
        raise _cannot_build(source, f"model_type is {model_type!r}")
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        return module.Model, module.ModelArgs
    except (ImportError, AttributeError) as error:
        raise _cannot_build(source, f"mlx-lm has no module for model_type {model_type!r}") from error


def _cannot_build(source: ModelSource, cause: str) -> ModelError:
    return ModelError(
        "QH-M51",
        f"mlx-lm cannot build {source.facts.architecture or source.facts.model_type or 'this model'}.",
        where=source.name,
        cause=cause.splitlines()[0],
        fix="Choose another model, or update mlx-lm.",
    )


def translated_config(
    config: Mapping[str, object], tensors: Iterable[str], arguments_class: type[Any]
) -> dict[str, object]:
    """config.json in the words of mlx-lm's `ModelArgs`."""
    known = inspect.signature(arguments_class).parameters
    translated = dict(config)
    if "rope_parameters" not in known:
        rope = text_config(config).get("rope_parameters")
        translated |= _rope_settings(rope, known) if isinstance(rope, dict) else {}
    # mlx-lm ties by default, transformers does not: the head's weights would be dropped without a word.
    if "tie_word_embeddings" not in text_config(config):
        translated["tie_word_embeddings"] = not any(name.endswith("lm_head.weight") for name in tensors)
    return translated


def _rope_settings(rope: Mapping[str, Any], known: Iterable[str]) -> dict[str, object]:
    """transformers 5 keeps all of rotary position in `rope_parameters`, once or for each kind of layer."""
    by_layer = {kind: given for kind, given in rope.items() if isinstance(given, dict) and kind.endswith("attention")}
    if by_layer:
        rope = by_layer.get("full_attention", {})
    settings = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope and key in known}
    if rope.get("rope_type", "default") != "default" and "rope_scaling" in known:
        settings["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    local = by_layer.get("sliding_attention", {}).get("rope_theta")
    if local is not None and "rope_local_base_freq" in known:
        settings["rope_local_base_freq"] = local
    return settings
