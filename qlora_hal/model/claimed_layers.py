"""How many layers a configuration claims, held against the weights before anyone builds as many.

A model library makes an object for every layer of the configuration before it looks for a weight: a number of a few
digits takes minutes and gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qlora_hal.errors import ModelError

MAX_LAYERS = 2048
"""Sixteen times the 126 layers of Llama 3.1 405B."""
_FEW = 256
"""Up to here the loading itself finds the layers that are missing, and names their tensors."""
_COUNTS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?)$")
_ONE_FOR_EACH = re.compile(r"layer|block|depth|pattern")
"""Names of lists and texts with an entry for each layer, whose length some configurations take for the number."""
_OF_OTHERS = re.compile("quant")
"""What is said of quantization names modules, which may be many."""


MAX_OF_OTHERS = 4096
"""Twice the 2048 experts of the largest Switch Transformer; labels are of a classifier, which is not trained here."""
_COUNTS_OF_OTHERS = re.compile(r"(?:^|_)(?:experts|labels)$")


def refuse_claimed_layers(config: Mapping[str, object], tensors: Collection[str], folder: Path) -> None:
    """Raise ModelError (QH-M50) where a configuration claims far more layers than the weights have, or more experts or
    labels than any model."""
    for name, claimed in _claims_of_others(config):
        if claimed > MAX_OF_OTHERS:
            raise ModelError(
                "QH-M50",
                f"config.json claims {_shown(claimed)} in {name[:80]}; at most {MAX_OF_OTHERS} are read.",
                where=str(folder / "config.json"),
                cause="An object is made for each of them before weights are looked for.",
                fix="Get all files of the model again from one revision.",
                context={"claimed": str(_shown(claimed))},
            )
    stored = _stored_layers(tensors)
    for name, claimed in _claims(config):
        if claimed > MAX_LAYERS or claimed > max(stored, _FEW):
            shown = _shown(claimed)
            raise ModelError(
                "QH-M50",
                f"config.json claims {shown} layers ({name[:80]}); the weights have {stored}"
                + (f", and at most {MAX_LAYERS} are read." if stored >= claimed else "."),
                where=str(folder / "config.json"),
                cause="Each layer is built before its weights are looked for.",
                fix="Get all files of the model again from one revision.",
                context={"claimed": str(shown), "stored": stored},
            )


def _stored_layers(tensors: Collection[str]) -> int:
    """The layers of the longest numbered row of modules."""
    numbers = (part for name in tensors for part in name.split(".") if part.isascii() and part.isdigit())
    return max((int(number) + 1 for number in numbers if len(number) <= 9), default=0)


def _shown(number: int) -> int | str:
    return number if number.bit_length() <= 64 else f"a number of {number.bit_length()} bits"


def _claims(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Names and numbers of layers, of the language model and of every part beside it."""
    for name, value in _settings(config):
        if type(value) is int and _COUNTS.search(name):
            yield name, value
        elif isinstance(value, list | str) and _ONE_FOR_EACH.search(name):
            yield name, len(value)


def _claims_of_others(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """The same of experts and labels."""
    return ((name, value) for name, value in _settings(config) if type(value) is int and _COUNTS_OF_OTHERS.search(name))


def _settings(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Names and values, those of nested parts included and those of quantization left out."""
    waiting: list[Mapping[str, object]] = [config]
    while waiting:
        for name, value in waiting.pop().items():
            if _OF_OTHERS.search(name):
                continue
            if isinstance(value, dict):
                waiting.append(value)
            else:
                yield name, value
