"""Adapters on stacks of experts in PEFT's files: a pair of tensors for each expert, named as the hub's layers are.

A stack's A `[experts, r, in]` is written as `<block>.experts.0.<projection>.lora_A.weight` `[r, in]` and so on. PEFT
(0.21, `utils/transformers_weight_conversion.py`) turns these into what the model library holds: gate and up projection
as one weight, whose adapter has rank 2 r, block by block. What it also needs is told by adapter_config.json: the fused
parameters (`target_parameters`), and that rank with the scale that leaves each half its own. A dense layer whose name
the experts' projections share (of a shared expert, say) is named as a parameter, too: as a module, PEFT would take its
name for the experts' and leave the layer out.

gpt-oss and GraniteMoe have no layers of single experts on the hub, and PEFT makes none of such names: their adapters
are written as PEFT holds them, A of all experts as `[experts * r, in]` and B as `[out, r * experts]`, of gate and up as
one, their rows in turns or, in GraniteMoe, those of the gate first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.adapter.naming import lora_a_key, lora_b_key, module_of
from qlora_hal.contract.values import AdapterConfig
from qlora_hal.model import expert_stacks
from qlora_hal.model.expert_stacks import GATE_AND_UP, path_of, place_of

if TYPE_CHECKING:
    from qlora_hal.files.safetensors_file import Array

LAYOUT, NUMBERED, INTERLEAVED, CONCATENATED = "experts_in_files", "numbered", "interleaved", "concatenated"
"""The key that the provenance of every adapter on a mixture has, and its values: experts have names of their own, or
none, with gate and up in turns or one behind the other."""
_WITHOUT_NAMES = frozenset({INTERLEAVED, CONCATENATED})
_INNER = ".base_layer"
FIELDS = ("target_parameters", "rank_pattern", "alpha_pattern")
"""Fields of adapter_config.json that plain LoRA on linear layers does not need."""

_FUSED = {
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
}  # fmt: skip
_BLOCKS = {"block_sparse_moe": "mlp", "ffn": "mlp"}
"""What transformers calls a block that checkpoints name otherwise."""
_FUSED_RANK = r".*\.gate_up_proj"


def layout_of(model_type: str) -> str:
    """How the adapters of a kind of mixture name experts in files."""
    if model_type in expert_stacks.INTERLEAVED:
        return INTERLEAVED
    return CONCATENATED if model_type in expert_stacks.CONCATENATED else NUMBERED


def per_expert(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors of stacks as one for each expert; all others as they are."""
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            found[name] = tensor
            continue
        module, half = module_of(name)
        key = lora_a_key if half == "A" else lora_b_key
        found |= {key(path_of(module, number)): part for number, part in enumerate(tensor)}
    return found


def in_files(tensors: Mapping[str, Array], provenance: Mapping[str, object]) -> dict[str, Array]:
    """All tensors of an adapter as files hold them. `provenance` says where experts have no names of their own."""
    if provenance.get(LAYOUT) not in _WITHOUT_NAMES:
        return per_expert(tensors)
    in_turns = provenance[LAYOUT] == INTERLEAVED
    found = {name: tensor for name, tensor in tensors.items() if tensor.ndim != 3}
    stacks = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3}
    for module in sorted({module_of(name)[0] for name in stacks}):
        block, _, projection = module.rpartition(".")
        a, b = stacks[lora_a_key(module)], stacks[lora_b_key(module)]
        if projection == "up_proj":
            continue
        if projection == "gate_proj":
            other = f"{block}.up_proj"
            a = np.concatenate([a, stacks[lora_a_key(other)]], axis=1)
            experts, outputs, r = b.shape
            sides = (outputs, 2) if in_turns else (2, outputs)
            both = np.zeros((experts, *sides, 2, r), b.dtype)
            by_half = np.moveaxis(both, 2, 1) if in_turns else both  # [experts, 2, out, 2, r]
            by_half[:, 0, :, 0], by_half[:, 1, :, 1] = b, stacks[lora_b_key(other)]
            b, block = both.reshape(experts, 2 * outputs, 2 * r), f"{block}{_INNER}"
        found[lora_a_key(block)] = a.reshape(-1, a.shape[2])
        found[lora_b_key(block)] = np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1)
    return found


def named(tensors: Mapping[str, Array], r: object, provenance: Mapping[str, object]) -> dict[str, Array]:
    """Of tensors in a file, those of experts under names of their own. Raises ValueError where they do not have rank
    `r`."""
    if provenance.get(LAYOUT) not in _WITHOUT_NAMES or type(r) is not int or r < 1:
        return dict(tensors)
    in_turns = provenance[LAYOUT] == INTERLEAVED
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        module, half = module_of(name)
        block = module.removesuffix(_INNER)
        if not block.endswith(".experts"):
            found[name] = tensor
            continue
        rank = r if block == module else 2 * r
        if tensor.shape[0 if half == "A" else 1] % rank:
            raise ValueError(f"{name} has no whole number of experts of rank {rank}")
        if half == "A":
            key, stack = lora_a_key, tensor.reshape(-1, rank, tensor.shape[1])
            parts = [stack] if rank == r else [stack[:, :r], stack[:, r:]]
        else:
            key, stack = lora_b_key, tensor.reshape(tensor.shape[0], rank, -1).transpose(2, 0, 1)
            gate, up = (stack[:, ::2], stack[:, 1::2]) if in_turns else np.array_split(stack, 2, axis=1)
            parts = [stack] if rank == r else [gate[..., :r], up[..., r:]]
        leaves = ("down_proj",) if rank == r else GATE_AND_UP[0]
        found |= {key(f"{block}.{leaf}"): np.ascontiguousarray(part) for leaf, part in zip(leaves, parts, strict=True)}
    return per_expert(found)


def stacks_in(tensors: Iterable[str]) -> set[str]:
    """Paths of the stacks whose experts have tensors under these names, which may hold others."""
    stacks: set[str] = set()
    for name in tensors:
        with suppress(ValueError):
            if place := place_of(module_of(name)[0]):
                stacks.add(place.module)
    return stacks


def stacked(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse. Raises ValueError, with words for a message, where the tensors of a stack's experts do not fit
    together."""
    found: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    for name, tensor in tensors.items():
        module, half = module_of(name)
        if place := place_of(module):
            key = lora_a_key if half == "A" else lora_b_key
            stacks.setdefault(key(place.module), {})[place.number] = tensor
        else:
            found[name] = tensor
    for name, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))):
            raise ValueError(f"{name} has {len(experts)} experts, with numbers up to {max(experts)}")
        if len({tensor.shape for tensor in experts.values()}) > 1:
            raise ValueError(f"the experts of {name} have tensors of different shapes")
        found[name] = np.stack([experts[number] for number in range(len(experts))])
    return found


def fields_for(
    config: AdapterConfig, stacks: Collection[str], linear_modules: Collection[str] | None
) -> dict[str, object]:
    """What adapter_config.json says where the model is a mixture, of which `stacks` are among the targets:
    `target_modules` and `FIELDS`. Names are short where all modules of the model that they mean are targets."""
    parameters = {_parameter(module, is_stack=module in stacks) for module in config.target_modules}
    plain = sorted(module for module in config.target_modules if module not in stacks and not _shares_name(module))
    parameters.discard("")
    gated = any(name.endswith(".gate_up_proj") for name in parameters)
    return {
        "target_modules": _short_modules(plain, linear_modules),
        "target_parameters": _short_parameters(parameters, stacks, linear_modules),
        **(patterns(config) if gated else {"rank_pattern": {}, "alpha_pattern": {}}),
    }


def patterns(config: AdapterConfig) -> dict[str, object]:
    """The rank of a fused gate and up projection, and the alpha that leaves each half its scale."""
    alpha = config.alpha * 2 ** (0.5 if config.use_rslora else 1.0)
    return {
        "rank_pattern": {_FUSED_RANK: 2 * config.r},
        "alpha_pattern": {_FUSED_RANK: int(alpha) if alpha == int(alpha) else alpha},
    }


def left_out(modules: Iterable[str], stacks: Collection[str], parameters: Collection[str]) -> list[str]:
    """Those of `modules` that `target_parameters` does not mean."""
    places = {module: place_of(module) for module in modules}
    paths = {module: place.module if place else module for module, place in places.items()}
    return [
        module
        for module, path in paths.items()
        if not _is_meant(_parameter(path, is_stack=path in stacks, always=True), parameters)
    ]


def _is_meant(name: str, parameters: Collection[str]) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in parameters)


def _shares_name(module: str) -> bool:
    return module.rpartition(".")[2] in _FUSED


def _parameter(module: str, *, is_stack: bool, always: bool = False) -> str:
    """The parameter of the model library that holds a module's weight; "" where PEFT takes the module's name."""
    if not is_stack:
        return f"{module}.weight" if always or _shares_name(module) else ""
    block, _, projection = module.rpartition(".")
    # GraniteMoe's block keeps its name; Mixtral's, whose projections have numbers, does not.
    kept = "block_sparse_moe" if projection in (*GATE_AND_UP[0], "down_proj") else ""
    parts = (part if part == kept else _BLOCKS.get(part, part) for part in block.split("."))
    return ".".join((*parts, _FUSED.get(projection, projection)))


def _short_modules(named: list[str], linear_modules: Collection[str] | None) -> list[str]:
    leaves = {path.rpartition(".")[2] for path in named}
    if linear_modules is None:
        return named
    reached = {path for path in linear_modules if path.rpartition(".")[2] in leaves}
    return sorted(leaves) if reached == set(named) else named


def _short_parameters(
    parameters: Collection[str], stacks: Collection[str], linear_modules: Collection[str] | None
) -> list[str]:
    dense = {name for name in parameters if name.endswith(".weight")}
    fused = set(parameters) - dense
    if linear_modules is not None and {path for path in linear_modules if _is_in_stack(path)} == set(stacks):
        fused = {".".join(name.split(".")[-2:]) for name in fused}
    return sorted(fused | dense)


def _is_in_stack(path: str) -> bool:
    return "experts" in path.split(".")
