"""From a folder of safetensors to a frozen, quantized model, one tensor at a time.

The architecture is mlx-lm's own code. The weight files' headers were checked by the core; MLX opens the files lazily,
and each weight is read, packed and dropped before the next: the 16-bit model never stands whole in memory.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.rotary_length import RotaryLength, rotary_length
from qlora_hal.errors import ModelError
from qlora_hal.model.facts import text_config
from qlora_hal.model.own_dropout import dropout_note
from qlora_hal.model.source import ModelSource
from qlora_hal.model.stored_dtypes import not_a_weight, packed_elsewhere
from qlora_hal_backends.mlx_lora.architecture import build_model, read_config
from qlora_hal_backends.mlx_lora.base_weights import BaseWeight
from qlora_hal_backends.mlx_lora.compared import check_compared
from qlora_hal_backends.mlx_lora.config_reading import Config
from qlora_hal_backends.mlx_lora.embedding import put_embedding_right
from qlora_hal_backends.mlx_lora.expert_loading import (
    StoredExperts,
    blocks_with_experts,
    forget_joined,
    left_as_they_are,
    load_experts,
    names_in_mlx_lm,
    refuse_joined_in_turns,
    take_experts,
)
from qlora_hal_backends.mlx_lora.experts import ExpertBlock, FrozenExperts, FrozenStacks
from qlora_hal_backends.mlx_lora.gradient_checkpointing import RecomputedLayer
from qlora_hal_backends.mlx_lora.head import Head, find_head
from qlora_hal_backends.mlx_lora.linear_weights import read_base_weight, require_finite
from qlora_hal_backends.mlx_lora.lora_linear import FrozenLinear, LoRASlots
from qlora_hal_backends.mlx_lora.sliding_window import MissingWindow
from qlora_hal_backends.mlx_lora.stored_tensors import (
    Weights,
    mismatch,
    open_tensors,
    renamed,
    ties_its_head,
    with_the_head_that_is_tied,
)


@dataclass(slots=True)
class BaseModel:
    """A loaded base. `linears` are by the names of the checkpoint, which are the canonical ones; a stack of experts is
    one.

    `rotary` tells where rotary positions change with the length of a row; `mixes_samples` why several samples cannot
    share a row, "" where they can, None while nobody has asked (`packing.why_not`).
    """

    causal: Any
    head: Head | None
    linears: Mapping[str, FrozenLinear | FrozenExperts]
    slots: LoRASlots
    architecture: str
    window: MissingWindow
    rotary: RotaryLength | None
    mixes_samples: str | None = None


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model and the tensors that belong in it, none of them read. `linears` maps the path of every linear layer that
    can carry LoRA to its module; `blocks` are the mixtures of experts, whose tensors `experts` holds. `read` is
    config.json as transformers reads it."""

    causal: Any
    window: MissingWindow
    rotary: RotaryLength | None
    weights: Weights
    linears: Mapping[str, Module]
    hidden_size: int
    notes: tuple[str, ...]
    blocks: tuple[ExpertBlock, ...]
    experts: StoredExperts
    read: Config

    def paths(self) -> frozenset[str]:
        """The canonical paths of all modules that can carry LoRA."""
        stacks = (stack for block in self.blocks for stack in block.stacks)
        return frozenset((*(self.weights.origin[path] for path in self.linears), *stacks))


def assemble(source: ModelSource) -> Assembled:
    """mlx-lm's model, and every stored tensor assigned to it. Raises ModelError: QH-M51 for an architecture that mlx-lm
    lacks or would compute otherwise, QH-M50 with every tensor that is missing or left over."""
    refuse_joined_in_turns(source)
    read = read_config(source)
    notes = check_compared(source, read)
    arrays = open_tensors(source)
    is_tied = ties_its_head(arrays, source.facts.config, read)
    built = build_model(source, read, is_tied)
    causal = built.causal
    if is_tied:
        arrays = with_the_head_that_is_tied(arrays, causal)
    experts = take_experts(arrays, source)
    forget_joined(arrays, experts)
    weights = renamed(arrays, causal, source)
    blocks = blocks_with_experts(causal, experts, source)
    packed_apart = names_in_mlx_lm(blocks)
    for name in packed_apart & weights.arrays.keys():
        del weights.arrays[name]
    linears = {
        path: module
        for path, module in reversed(causal.named_modules())
        if type(module) is Linear and weights.origin.get(path) in source.facts.linear_modules
    }
    _refuse_packed_elsewhere(weights, linears, source)
    _check_complete(causal, weights, source, packed_apart)
    hidden_size = int(text_config(read).get("hidden_size") or 0)
    return Assembled(
        causal,
        built.window,
        rotary_length(text_config(read)),
        weights,
        linears,
        hidden_size,
        (*notes, *weights.notes, *built.notes, *left_as_they_are(causal, blocks), *_dropout(read)),
        blocks,
        experts,
        read,
    )


def _refuse_packed_elsewhere(weights: Weights, linears: Collection[str], source: ModelSource) -> None:
    """Raises ModelError QH-C72 for a weight that bitsandbytes packed outside the linear layers: the head's, most often.
    MLX's own packed heads and embeddings are used."""
    for name in weights.arrays:
        path, _, part = name.partition(".weight.")
        if part and path not in linears:
            raise packed_elsewhere(weights.origin.get(path, path), source.name)


def _dropout(read: Config) -> tuple[str, ...]:
    return tuple(filter(None, [dropout_note(read)]))


def load_base(source: ModelSource, quantization: Quantization, compute: Compute) -> BaseModel:
    """Assemble, read and pack. Raises ModelError as `assemble` does, and for tensors that are not finite (QH-M52)."""
    dtype = getattr(mx, compute.dtype)
    assembled = assemble(source)
    causal, weights = assembled.causal, assembled.weights
    slots = LoRASlots()
    linears: dict[str, FrozenLinear | FrozenExperts] = {}
    for path, module in assembled.linears.items():
        base = _packed(weights, path, source, quantization, dtype, expected=_sides(module))
        bias = weights.take(f"{path}.bias").astype(mx.float32) if weights.has(f"{path}.bias") else None
        mx.eval(*base.arrays, *([] if bias is None else [bias]))
        require_finite(path, base.arrays, source.name)
        require_finite(f"{path}.bias", () if bias is None else (bias,), source.name)
        frozen = FrozenLinear(base, bias, slots)
        _place(causal, path, frozen)
        linears[weights.origin[path]] = frozen
    for block in assembled.blocks:
        linears |= load_experts(block, assembled.experts, source, quantization, dtype, slots, assembled.read)
    _fill_parameters(causal, weights, source, dtype)
    put_embedding_right(causal, source.facts.model_type, assembled.hidden_size, dtype)
    base_model = BaseModel(
        causal,
        find_head(causal, source.facts.architecture),
        linears,
        slots,
        source.facts.architecture,
        assembled.window,
        assembled.rotary,
    )
    if compute.gradient_checkpointing:
        _recompute_layers(base_model)
    return base_model


def _sides(linear: Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return rows, columns


def _packed(
    weights: Weights, path: str, source: ModelSource, quantization: Quantization, dtype: Any, expected: tuple[int, int]
) -> BaseWeight:
    base = read_base_weight(weights, path, source, quantization, dtype)
    if base.shape != expected:
        raise _shape_mismatch(source.name, f"{path}.weight", base.shape, expected)
    return base


def _place(causal: Any, path: str, frozen: FrozenLinear) -> None:
    *parents, leaf = path.split(".")
    owner = causal
    for part in parents:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    setattr(owner, leaf, frozen)


def _quantized_places(causal: Any, weights: Weights) -> frozenset[str]:
    """Embeddings, heads and routers that the checkpoint holds in MLX's packed form."""
    return frozenset(
        path
        for path, module in causal.named_modules()
        if hasattr(module, "to_quantized") and weights.has(f"{path}.scales")
    )


def _fill_parameters(causal: Any, weights: Weights, source: ModelSource, dtype: Any) -> None:
    _quantize_places(causal, weights, source)
    for name, parameter in _parameters(causal):
        array = weights.take(name)
        if array.shape != parameter.shape:
            raise _shape_mismatch(source.name, name, tuple(array.shape), tuple(parameter.shape))
        if _is_floating(array.dtype):
            array = array.astype(dtype)
        causal.load_weights([(name, array)], strict=False)
        mx.eval(array)
        require_finite(weights.origin.get(name.removesuffix(".weight"), name), (array,), source.name)


def _parameters(causal: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(causal.parameters()))


def _quantize_places(causal: Any, weights: Weights, source: ModelSource) -> None:
    stored = source.facts.prequantized
    if stored is None or stored.method != "mlx":
        return
    places = _quantized_places(causal, weights)
    quantize(
        causal,
        group_size=int(str(stored.settings["group_size"])),
        bits=int(str(stored.settings["bits"])),
        mode=str(stored.settings.get("mode", "affine")),
        class_predicate=lambda path, module: path in places,
    )


def _check_complete(causal: Any, weights: Weights, source: ModelSource, apart: Collection[str]) -> None:
    """Raises ModelError QH-M50 with all that is missing or left over, or for a wrong shape or dtype, before anything is
    read. What is in `apart` is checked where it is packed."""
    packed = source.facts.prequantized is not None
    expected = {name: parameter for name, parameter in _parameters(causal) if name not in apart}
    missing = sorted(name for name in expected if not weights.has(name))
    left = [
        name
        for name in sorted(weights.arrays)
        if name not in expected and not (packed and _belongs_to_packed(name, expected))
    ]
    if missing or left:
        raise mismatch(source.name, missing, left)
    for name, parameter in expected.items():
        dtype = weights.arrays[name].dtype
        if _is_floating(parameter.dtype) and not _is_floating(dtype) and not _is_packed(name, weights):
            stored = weights.origin.get(name.removesuffix(".weight"), name.removesuffix(".weight"))
            ending = ".weight" if name.endswith(".weight") else ""
            raise not_a_weight(stored + ending, str(dtype).removeprefix("mlx.core."), source.name)
    for name, parameter in expected.items() if not packed else ():
        if weights.arrays[name].shape != parameter.shape:
            raise _shape_mismatch(source.name, name, tuple(weights.arrays[name].shape), tuple(parameter.shape))


def _is_floating(dtype: mx.Dtype) -> bool:
    return bool(mx.issubdtype(dtype, mx.floating))


def _is_packed(name: str, weights: Weights) -> bool:
    """Whether the tensor is codes that others beside it describe."""
    described = weights.has(f"{name.removesuffix('.weight')}.scales")
    return described or any(other.startswith(f"{name}.") for other in weights.arrays)


def _belongs_to_packed(name: str, expected: Collection[str]) -> bool:
    """Whether a tensor describes the packed weight of a module that the model has."""
    module, _, rest = name.partition(".weight.")
    if rest:
        return f"{module}.weight" in expected
    module, _, leaf = name.rpartition(".")
    return leaf in ("scales", "biases") and f"{module}.weight" in expected


def _shape_mismatch(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    return ModelError(
        "QH-M50",
        f"{name} has shape {list(found)}; config.json asks for {list(expected)}.",
        where=where,
        fix="Check that config.json belongs to these weights.",
    )


def _recompute_layers(base: BaseModel) -> None:
    layers = decoder_layers(base.causal)
    by_identity = {id(linear): linear for linear in base.linears.values()}
    for index, layer in enumerate(layers):
        inside = [by_identity[id(part)] for part in _parts(layer) if id(part) in by_identity]
        layers[index] = RecomputedLayer(layer, inside, base.slots)


def _parts(module: Any) -> list[Any]:
    """The frozen layers below a module: they are attributes, not children that MLX knows."""
    found = [value for child in module.modules() for value in vars(child).values()]
    stacks = [part for value in found if isinstance(value, FrozenStacks) for part in (value.gate, value.up, value.down)]
    return [*(value for value in found if isinstance(value, FrozenLinear)), *stacks]


def decoder_layers(causal: Any) -> list[Any]:
    """The model's own list of decoder layers, to be changed in place. What `causal.layers` gives is a copy where mlx-lm
    can cut a model into pipeline stages (Qwen3-MoE, DeepSeek-V3): a change of it would change nothing."""
    shown = list(causal.layers)
    for module in causal.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(shown) and all(map(operator.is_, value, shown)):
                return value
    raise ModelError(
        "QH-M51",
        f"No list of decoder layers was found in {type(causal).__module__}.",
        fix="Set training.gradient_checkpointing false, or choose another model.",
    )
