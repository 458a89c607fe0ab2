"""From a Hugging Face config.json to mlx-lm's model of it, still without weights.

mlx-lm reads config.json with defaults of its own, and it does not know all names of transformers 5: what it would get
silently wrong is translated here.
"""

from __future__ import annotations

import importlib
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from qlora_hal.errors import ModelError
from qlora_hal.errors.foreign import first_words, missing_package
from qlora_hal.model.source import ModelSource
from qlora_hal.processes.subprocess_call import one_line
from qlora_hal_backends.mlx_lora.activations import put_activations_right
from qlora_hal_backends.mlx_lora.config_reading import (
    Config,
    as_transformers_reads,
    in_words_of_mlx_lm,
    notes_on_keys_not_read,
    tied_words,
)
from qlora_hal_backends.mlx_lora.rotary import put_rotary_positions_right
from qlora_hal_backends.mlx_lora.sliding_window import MissingWindow, missing_window

_MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_NO_MODELS = frozenset({"activations", "base", "cache", "pipeline", "rope_utils", "switch_layers"})


@dataclass(frozen=True, slots=True)
class Built:
    """mlx-lm's model, its parameters lazy and without memory; what it leaves out; sentences for the user."""

    causal: Any
    window: MissingWindow
    notes: tuple[str, ...]


def build_model(source: ModelSource, read: Config, is_tied: bool) -> Built:
    """mlx-lm's model for this checkpoint.

    Raises ModelError QH-M51 for an architecture that mlx-lm lacks or cannot build from this config.json.
    """
    model_class, arguments_class = _classes(source)
    try:
        words = in_words_of_mlx_lm(source.facts.config, read, arguments_class)
        causal = model_class(arguments_class.from_dict({**words, **tied_words(words, is_tied)}))
        put_rotary_positions_right(causal, read)
        causal.freeze()
        causal.eval()
    except Exception as error:  # whatever mlx-lm raises over a configuration
        raise _cannot_build(source, f"{type(error).__name__}: {error}", _CORRECT) from error
    put_activations_right(causal, source, read)
    window = missing_window(source, read, arguments_class)
    return Built(causal, window, (*notes_on_keys_not_read(source.facts.config, arguments_class), *window.notes()))


def _classes(source: ModelSource) -> tuple[Any, Any]:
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

    model_type, architecture = source.facts.model_type, source.facts.architecture
    name = MODEL_ARCHITECTURE_REMAPPING.get((model_type, architecture)) or MODEL_REMAPPING.get(model_type, model_type)
    # The name comes from a file: nothing but a module of mlx_lm.models may be imported by it.
    if not _MODULE_NAME.fullmatch(name) or name in _NO_MODELS:
        raise _cannot_build(source, f"model_type is {model_type!r}")
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            module = importlib.import_module(f"mlx_lm.models.{name}")
        return module.Model, module.ModelArgs
    except (ImportError, AttributeError, SystemExit) as error:
        if package := missing_package(error):
            raise _needs_a_package(source, package, said.getvalue()) from error
        raise _cannot_build(source, f"mlx-lm has no module for model_type {model_type!r}") from error


def _needs_a_package(source: ModelSource, package: str, advice: str) -> ModelError:
    """`advice`: what mlx-lm printed before it left."""
    return ModelError(
        "QH-M51",
        f"mlx-lm cannot build {source.facts.architecture or source.facts.model_type}: its module needs the package "
        f"{package}, which is not installed.",
        where=source.name,
        cause=one_line(advice),
        fix="Install that package, or choose another backend for this model.",
        context={"package": package},
    )


def read_config(source: ModelSource) -> Config:
    """config.json as transformers reads it. Raises ModelError QH-M51 where transformers refuses it."""
    try:
        return as_transformers_reads(source.facts.config)
    except ValueError as error:
        raise _cannot_build(source, str(error), _CORRECT) from error


_CORRECT = (
    "Correct config.json, or get it again from where the model is from: mlx-lm knows the family, so a value in that "
    "file is at fault."
)


def _cannot_build(source: ModelSource, cause: str, fix: str = "Choose another model, or update mlx-lm.") -> ModelError:
    return ModelError(
        "QH-M51",
        f"mlx-lm cannot build {source.facts.architecture or source.facts.model_type or 'this model'}.",
        where=source.name,
        cause=first_words(cause),
        fix=fix,
    )
