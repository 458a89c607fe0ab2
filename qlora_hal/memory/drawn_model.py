"""A model with another one's widths and few of its layers, written to measure what a layer takes.

Its weights are random numbers that repeat: their values decide nothing about memory.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_hal.files.safetensors_file import DTYPE_BITS

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts

_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DTYPES = ("F32", "F16", "BF16")
_SPREAD = 0.02
"""Standard deviation of the weights, as transformers initializes most models: losses stay finite."""
_BLOCK = 2**20
_WORDS = 12
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def layers_of(facts: ModelFacts) -> int:
    """How many numbered decoder layers the tensors have; 0 where they are numbered in another way."""
    numbers = (int(found[1]) for name in facts.tensors if (found := _LAYER.match(name)))
    return max(numbers, default=-1) + 1


def first_layers(facts: ModelFacts, layers: int) -> ModelFacts:
    """The facts of the same model with its first layers alone."""
    before = layers_of(facts)

    def held(name: str) -> bool:
        found = _LAYER.match(f"{name}.")
        return found is None or int(found[1]) < layers

    tensors = {name: tensor for name, tensor in facts.tensors.items() if held(name)}
    gone = sum(math.prod(tensor.shape) for name, tensor in facts.tensors.items() if name not in tensors)
    return replace(
        facts,
        config=_cut(facts.config, before, layers),
        tensors=tensors,
        linear_modules={name: shape for name, shape in facts.linear_modules.items() if held(name)},
        parameter_count=facts.parameter_count - gone,
    )


def write_drawn_model(facts: ModelFacts, layers: int, folder: Path, tokenizer: Path | None = None) -> None:
    """Write config.json, weights and a tokenizer for the first `layers` layers into `folder`, which is empty. The
    tokenizer is that in the folder `tokenizer` where one lies there, else one of a few words."""
    cut = first_layers(facts, layers)
    held = {
        name: (tensor.dtype if tensor.dtype in _DTYPES else "F32", tensor.shape) for name, tensor in cut.tensors.items()
    }
    (folder / "config.json").write_text(json.dumps(cut.config), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.writelines(_chunks(held))
    if tokenizer is not None and (tokenizer / _TOKENIZER_FILES[0]).is_file():
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    else:
        _write_tokenizer(folder)


def drawn_text(tokens: int) -> str:
    """Words that are at least so many tokens for every tokenizer."""
    return " ".join(f"w{number % _WORDS}" for number in range(tokens + 1))


def _cut(config: Mapping[str, object], before: int, layers: int) -> dict[str, object]:
    """The configuration of the first layers: counts, and lists with an entry for each layer."""
    cut: dict[str, object] = {}
    for name, value in config.items():
        if name in _COUNTS and value == before:
            cut[name] = layers
        elif isinstance(value, list) and len(value) == before and "layer" in name:
            cut[name] = value[:layers]
        elif name == "text_config" and isinstance(value, dict):
            cut[name] = _cut(value, before, layers)
        else:
            cut[name] = value
    return cut


def _chunks(held: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[bytes]:
    entries, end = {}, 0
    for name, (dtype, shape) in held.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    blocks = {dtype: _block(dtype) for dtype in _DTYPES}
    for dtype, shape in held.values():
        left = math.prod(shape) * DTYPE_BITS[dtype] // 8
        # Norms have one dimension, and a scale of 0.02 would leave nothing of what passes them.
        block = _ones(dtype) if len(shape) == 1 else blocks[dtype]
        while left:
            yield block[:left]
            left -= min(left, len(block))


def _block(dtype: str) -> bytes:
    return _stored(np.random.default_rng(0).normal(0, _SPREAD, _BLOCK).astype(np.float32), dtype)


def _ones(dtype: str) -> bytes:
    return _stored(np.ones(_BLOCK // 64, np.float32), dtype)


def _stored(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def _write_tokenizer(folder: Path) -> None:
    special = ("<s>", "</s>", "<pad>", "<unk>")
    vocabulary = {word: number for number, word in enumerate((*special, *(f"w{n}" for n in range(_WORDS))))}
    described = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[word], "content": word, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for word in special
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}), encoding="utf-8"
    )
