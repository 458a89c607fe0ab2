"""What can be known of a model without loading it: its config.json and the headers of its safetensors files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.catalogue import layout_of
from qlora_hal.model import expert_stacks
from qlora_hal.model.claimed_layers import refuse_claimed_layers
from qlora_hal.model.fingerprint import fingerprint
from qlora_hal.model.linear_shapes import linear_modules
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal.model.prequantized import read_packing
from qlora_hal.model.safetensors_headers import Header
from qlora_hal.model.stored_dtypes import FLOATING_DTYPES, refuse_unread_dtypes
from qlora_hal.model.weight_files import read_headers, read_json

LARGEST_SIZE = 2**40
"""No width, count or number of positions reaches it; larger ones are no sizes."""
HEADERS = "the headers of the weight files"
CONFIG_ALONE = "config.json alone"
CONFIG_AND_SIZES = "config.json, with which the names and sizes of the weight files agree"
"""What facts are read from."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor as a header declares it."""

    dtype: str
    shape: tuple[int, ...]
    byte_count: int
    file: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts for selection, memory and target modules.

    `linear_modules` maps module path -> shape of every linear layer that can carry LoRA, the head left out, with
    the unpacked shapes of a pre-quantized checkpoint; a stack of experts is one of them (`expert_stacks`).
    `read_from` is where names and shapes are from. `fingerprint` is a SHA-256 over the headers and samples of the
    contents: equal shapes with other weights differ; it is empty while the weights lie on the hub, and without weights.
    """

    architecture: str
    model_type: str
    config: Mapping[str, object]
    tensors: Mapping[str, TensorFacts]
    linear_modules: Mapping[str, LinearShape]
    parameter_count: int
    fingerprint: str
    prequantized: Prequantized | None = None
    vocabulary_size: int = 0
    max_position_embeddings: int | None = None
    read_from: str = HEADERS

    @property
    def has_routed_experts(self) -> bool:
        return any(shape.experts > 1 for shape in self.linear_modules.values())


def read_facts(folder: Path, remote_headers: Sequence[Header] | None = None, *, read_from: str = HEADERS) -> ModelFacts:
    """Read config.json and the headers of the weight files; no weight is loaded. `remote_headers` are those of weight
    files that lie on the hub, or what config.json says of them; `read_from` says which, in words.

    Raises ModelError (QH-C70 config.json missing or broken, QH-C71 no weights, QH-C79 a missing shard, QH-C01 a
    truncated file, QH-C72 a quantization or dtype that no backend reads, QH-C73 a contradictory quantized checkpoint,
    QH-M50 far more layers in the configuration than in the weights, another number of experts, or experts to which no
    token could go) and UnsafeInputError
    (QH-C15, QH-C16 malformed headers).
    """
    config = read_json(folder / "config.json")
    headers = read_headers(folder) if remote_headers is None else remote_headers
    tensors = {
        name: TensorFacts(tensor.dtype, tensor.shape, tensor.byte_count, header.path.name)
        for header in headers
        for name, tensor in header.tensors.items()
    }
    refuse_claimed_layers(config, tensors, folder)
    packing = read_packing(folder, config, headers)
    refuse_unread_dtypes(tensors, str(folder))
    packed_shapes = dict(packing.shapes) if packing else {}
    layout = layout_of(packing.prequantized) if packing else None
    model_type = str(config.get("model_type", ""))
    vocabulary_size = _whole_number(config, "vocab_size") or 0
    shapes = _with_stacks(_plain_shapes(tensors), packed_shapes, tensors, config, str(folder))
    expert_stacks.refuse_nonsense(shapes.values(), text_config(config), str(folder))
    return ModelFacts(
        architecture=_architecture(config),
        model_type=model_type,
        config=config,
        tensors=tensors,
        linear_modules=linear_modules(shapes, model_type, vocabulary_size, tensors),
        parameter_count=_parameter_count(tensors, packed_shapes, layout.suffixes if layout else frozenset()),
        fingerprint=fingerprint(headers) if remote_headers is None else "",
        prequantized=packing.prequantized if packing else None,
        vocabulary_size=vocabulary_size,
        max_position_embeddings=_whole_number(config, "max_position_embeddings", "n_positions", "n_ctx"),
        read_from=read_from,
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: itself, or its `text_config`."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _whole_number(config: Mapping[str, object], *names: str) -> int | None:
    described = text_config(config)
    values = (described.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value < LARGEST_SIZE), None)


def _plain_shapes(tensors: Mapping[str, TensorFacts]) -> dict[str, LinearShape]:
    """Module path -> shape of every two-dimensional floating-point weight, stored as [out, in]."""
    return {
        name.removesuffix(".weight"): LinearShape(tensor.shape[1], tensor.shape[0])
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATING_DTYPES
    }


def _with_stacks(
    plain: Mapping[str, LinearShape],
    packed: Mapping[str, LinearShape],
    tensors: Mapping[str, TensorFacts],
    config: Mapping[str, object],
    where: str,
) -> dict[str, LinearShape]:
    """The layers with the experts of each projection as one module."""
    described = text_config(config)
    stacks = {name: shape for name, shape in packed.items() if shape.experts > 1}
    alone = {name: shape for name, shape in {**plain, **packed}.items() if name not in stacks}
    whole: dict[str, Sequence[int]] = {
        name: tensor.shape for name, tensor in tensors.items() if tensor.dtype in FLOATING_DTYPES
    }
    whole |= {name: shape.weight for name, shape in stacks.items()}
    return expert_stacks.joined(alone, described, where) | expert_stacks.of_joined_tensors(whole, described, where)


def _parameter_count(
    tensors: Mapping[str, TensorFacts], packed_shapes: Mapping[str, LinearShape], suffixes: frozenset[str]
) -> int:
    packed_tensors = {module + suffix for module in packed_shapes for suffix in suffixes}
    plain = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name not in packed_tensors)
    return plain + sum(shape.parameters for shape in packed_shapes.values())
