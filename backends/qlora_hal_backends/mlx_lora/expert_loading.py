"""The tensors of experts in a checkpoint, expert by expert, and the packed stacks they become.

mlx-lm stacks the experts of a layer before anything else; a stack in 16 bits is as large as many layers. So the tensors
of each expert are kept by themselves, lazy as they are, and each is packed before the next is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchLinear

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.model.expert_stacks import INTERLEAVED, path_of
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.base_weights import BaseWeight
from qlora_hal_backends.mlx_lora.config_reading import Config
from qlora_hal_backends.mlx_lora.expert_weights import StackedWeight, stacked
from qlora_hal_backends.mlx_lora.experts import FAMILIES, ExpertBlock, FrozenExperts, expert_blocks, put_experts
from qlora_hal_backends.mlx_lora.linear_weights import read_base_weight, require_finite
from qlora_hal_backends.mlx_lora.lora_linear import LoRASlots
from qlora_hal_backends.mlx_lora.stored_tensors import Arrays, Weights

STACKED_BY_MLX_LM = ("weight", "scales", "biases")
"""What mlx-lm's models stack of an expert; of bitsandbytes' other tensors they know nothing."""
_JOINED = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """Of each stack, by its canonical path, the tensors of every expert under the checkpoint's names."""

    stacks: Mapping[str, tuple[Arrays, ...]]


def take_experts(arrays: Arrays, source: ModelSource) -> StoredExperts:
    """The experts' tensors among `arrays`. Those that mlx-lm does not stack are taken out of it, and experts that are
    stored in one tensor of all (`gate_up_proj`) are put into it one by one."""
    shapes = {module: shape for module, shape in source.facts.linear_modules.items() if shape.experts > 1}
    if source.facts.model_type not in FAMILIES:
        shapes = {}
    for module, shape in shapes.items():
        _put_apart(arrays, module, shape)
    found: dict[str, list[Arrays]] = {module: [{} for _ in range(shape.experts)] for module, shape in shapes.items()}
    places = {path_of(module, n): (module, n) for module, shape in shapes.items() for n in range(shape.experts)}
    for name in list(arrays):
        path, _, part = _split(name)
        if path in places:
            module, number = places[path]
            found[module][number][name] = arrays[name]
            if part not in STACKED_BY_MLX_LM:
                del arrays[name]
    return StoredExperts({module: tuple(parts) for module, parts in found.items()})


def refuse_joined_in_turns(source: ModelSource) -> None:
    """Raises ModelError QH-M51 for experts as gpt-oss has them, in 16 bits or in MXFP4: with biases, gate and up in
    turns."""
    facts = source.facts
    if facts.model_type in INTERLEAVED and any(shape.experts > 1 for shape in facts.linear_modules.values()):
        raise ModelError(
            "QH-M51",
            f"{facts.model_type} is not trained by this backend.",
            where=source.name,
            cause="Its experts have biases, and gate and up projection in turns; they are not read here.",
            fix="Train it with a backend of the torch family: qlora-hal backends lists them.",
        )


def _split(name: str) -> tuple[str, str, str]:
    """The path of an expert's layer, and what follows it."""
    parts = name.split(".")
    end = parts.index("experts") + 3 if "experts" in parts else 0
    return ".".join(parts[:end]), ".", ".".join(parts[end:])


def _put_apart(arrays: Arrays, module: str, shape: LinearShape) -> None:
    """A stack out of a tensor of all experts, as transformers 5 saves them: `[experts, out, in]`, gate before up."""
    block, _, projection = module.rpartition(".")
    whole = arrays.get(f"{block}.{projection}")
    if whole is None and projection in ("gate_proj", "up_proj") and f"{block}.{_JOINED}" in arrays:
        half = slice(0, shape.outputs) if projection == "gate_proj" else slice(shape.outputs, None)
        whole = arrays[f"{block}.{_JOINED}"][:, half]
    if whole is not None:
        arrays.update({f"{path_of(module, number)}.weight": whole[number] for number in range(shape.experts)})


def forget_joined(arrays: Arrays, stored: StoredExperts) -> None:
    """Take the tensors of all experts out of `arrays`: what was put apart of them is there."""
    for module in stored.stacks:
        block, _, projection = module.rpartition(".")
        arrays.pop(f"{block}.{projection}", None)
        arrays.pop(f"{block}.{_JOINED}", None)


def blocks_with_experts(causal: Any, stored: StoredExperts, source: ModelSource) -> tuple[ExpertBlock, ...]:
    """The mixtures whose experts are packed and adapted here. Raises ModelError QH-M51 for a checkpoint of such a
    family in which they are not stored as on the hub: they would stay as they are, unpacked and without adapters."""
    found = tuple(expert_blocks(causal, source.facts.model_type))
    for block in found:
        missing = [stack for stack in block.stacks if stack not in stored.stacks]
        if missing:
            raise ModelError(
                "QH-M51",
                f"The experts of {block.path} are not stored as on the hub: {missing[0]} was not found.",
                where=source.name,
                cause="mlx-lm's own checkpoints hold all experts of a layer in one tensor, switch_mlp.",
                fix="Name the model's original folder on the hub; it is quantized while loading.",
            )
    return found


def left_as_they_are(causal: Any, blocks: Iterable[ExpertBlock]) -> tuple[str, ...]:
    """A sentence on stacks of experts that carry no adapter and are not packed."""
    packed = {id(linear) for block in blocks for linear in _built(block)}
    others = [module for module in causal.modules() if isinstance(module, SwitchLinear) and id(module) not in packed]
    return (f"{len(others)} stacks of experts carry no LoRA here and stay in 16 bits.",) if others else ()


def names_in_mlx_lm(blocks: Iterable[ExpertBlock]) -> frozenset[str]:
    """What mlx-lm calls the stacked tensors of these blocks."""
    projections = ("gate_proj", "up_proj", "down_proj")
    return frozenset(
        f"{block.path}.switch_mlp.{projection}.{part}"
        for block in blocks
        for projection in projections
        for part in STACKED_BY_MLX_LM
    )


def load_experts(
    block: ExpertBlock,
    stored: StoredExperts,
    source: ModelSource,
    quantization: Quantization,
    dtype: Any,
    slots: LoRASlots,
    read: Config,
) -> dict[str, FrozenExperts]:
    """Pack the experts of one layer, and put them in their place; by the canonical path of each stack. Raises
    ModelError QH-M50 for a wrong shape, QH-M52 for numbers that are not finite."""
    found: dict[str, FrozenExperts] = {}
    for stack, linear in zip(block.stacks, _built(block), strict=True):
        _, out, inputs = linear.weight.shape
        base = _packed_stack(stack, stored, source, quantization, dtype, (out, inputs))
        found[stack] = FrozenExperts(base, slots)
    gate, up, down = (found[stack] for stack in block.stacks)
    put_experts(block, (gate, up, down), read)
    return found


def _built(block: ExpertBlock) -> tuple[Any, Any, Any]:
    switch = block.built.switch_mlp
    return switch.gate_proj, switch.up_proj, switch.down_proj


def _packed_stack(
    stack: str,
    stored: StoredExperts,
    source: ModelSource,
    quantization: Quantization,
    dtype: Any,
    expected: tuple[int, int],
) -> StackedWeight:
    parts: list[BaseWeight] = []
    for number, tensors in enumerate(stored.stacks[stack]):
        path = path_of(stack, number)
        weights = Weights(dict(tensors), {}, source.name)
        base = read_base_weight(weights, path, source, quantization, dtype)
        if base.shape != expected:
            raise ModelError(
                "QH-M50",
                f"{path}.weight has shape {list(base.shape)}; config.json asks for {list(expected)}.",
                where=source.name,
                fix="Check that config.json belongs to these weights.",
            )
        mx.eval(*base.arrays)
        require_finite(path, base.arrays, source.name)
        parts.append(base)
    whole = stacked(parts)
    mx.eval(*whole.arrays)
    return whole
