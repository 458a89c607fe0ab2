"""Routed experts in a checkpoint: all of one projection are one module, a stack, whatever tensors hold them.

The path of a stack is that of the hub's layer with the expert's number left out: `model.layers.0.mlp.experts.3.up_proj`
is expert 3 of `model.layers.0.mlp.experts.up_proj`. Adapters, first values and keys go by these paths on every backend,
also where a checkpoint stores all experts of a block in one tensor, gate and up projection joined
(`experts.gate_up_proj`): these are `experts.gate_proj` and `experts.up_proj` there, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError

GATE_AND_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of the two projections that model libraries hold as one weight."""
INTERLEAVED = frozenset({"gpt_oss"})
"""Model types that have no tensor for each expert anywhere: all of a block in one `[experts, in, out]`, gate and up in
turns."""
CONCATENATED = frozenset({"granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"})
"""The same as `[experts, out, in]`, gate before up, under names of their own (`_GRANITE`)."""
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What config.json calls the number of routed experts of a block."""
PER_TOKEN_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip
"""What it calls the number of experts that a token goes to."""

_ONE_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<projection>[\w.]+)")
_JOINED = re.compile(r"(?P<block>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)")
_GRANITE = re.compile(r"(?P<block>.+\.block_sparse_moe)\.(?P<projection>input_linear|output_linear)(\.weight)?")
_OF_GRANITE = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
"""What GraniteMoe stores for them (transformers 5.23, `conversion_mapping`)."""
_SHARED = frozenset({"shared_expert", "shared_experts", "shared_mlp"})


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """One expert of a stack: the stack's path and the expert's number."""

    module: str
    number: int


def place_of(module: str) -> ExpertPlace | None:
    """The stack that a layer with a number of its own belongs to; None for any other layer."""
    found = _ONE_EXPERT.fullmatch(module)
    return ExpertPlace(f"{found['block']}.{found['projection']}", int(found["number"])) if found else None


def path_of(module: str, number: int) -> str:
    """The inverse: the path of one expert's layer."""
    block, _, projection = module.rpartition(".experts.")
    return f"{block}.experts.{number}.{projection}"


def layer_in(linear_modules: Mapping[str, LinearShape], layer: str) -> LinearShape | None:
    """The shape of a layer as checkpoints store it, alone or as one expert of a stack; None where no module has it."""
    place = place_of(layer)
    if place is None:
        shape = linear_modules.get(layer)
        return shape if shape is None or shape.experts == 1 else None
    stack = linear_modules.get(place.module)
    return None if stack is None or place.number >= stack.experts else replace(stack, experts=1)


def layers_of(module: str, shape: LinearShape) -> list[str]:
    """The layers that a module is in a checkpoint with a tensor for each expert."""
    return [module] if shape.experts == 1 else [path_of(module, number) for number in range(shape.experts)]


def halves_of(tensor: str, linear_modules: Mapping[str, LinearShape]) -> tuple[str, ...]:
    """The stacks that a tensor of all experts of a block holds, one behind the other along its second side."""
    place = joined_place(tensor)
    if place is None:
        return ()
    block, projection = place
    names = GATE_AND_UP[0] if projection == "gate_up_proj" else (projection,)
    paths = tuple(f"{block}.{name}" for name in names)
    return paths if linear_modules.keys() >= set(paths) else ()


def is_joined(tensor: str) -> bool:
    """Whether a tensor's name says that it holds all experts of a block."""
    return joined_place(tensor) is not None


def joined_place(tensor: str) -> tuple[str, str] | None:
    """The path of the experts that a tensor holds all of, and whether it is their `gate_up_proj` or `down_proj`."""
    if found := _JOINED.fullmatch(tensor):
        return found["block"], found["projection"]
    if found := _GRANITE.fullmatch(tensor):
        return f"{found['block']}.experts", _OF_GRANITE[found["projection"]]
    return None


def is_shared(module: str) -> bool:
    """Whether a layer belongs to an expert that sees every token."""
    return not _SHARED.isdisjoint(module.split("."))


def paired_with(module: str) -> str:
    """The other half of a gated projection: `up_proj` for `gate_proj` and the other way round; "" without one."""
    block, _, projection = module.rpartition(".")
    pairs = {one: other for pair in GATE_AND_UP for one, other in (pair, reversed(pair))}
    return f"{block}.{pairs[projection]}" if projection in pairs else ""


def joined(shapes: Mapping[str, LinearShape], config: Mapping[str, object], where: str) -> dict[str, LinearShape]:
    """`shapes` with one entry for each stack in place of its experts'. A block with one expert alone stays as it is.

    Raises ModelError QH-M50 where the experts of a stack differ in shape, where one is missing, or where their number
    contradicts config.json.
    """
    found = {module: shape for module, shape in shapes.items() if place_of(module) is None}
    places = sorted((place.module, place.number, module) for module in shapes if (place := place_of(module)))
    for stack, members in groupby(places, key=lambda place: place[0]):
        paths = {number: module for _, number, module in members}
        if list(paths) == [0]:
            found[paths[0]] = shapes[paths[0]]
        else:
            found[stack] = _stacked(stack, {number: shapes[path] for number, path in paths.items()}, config, where)
    return found


def of_joined_tensors(
    tensors: Mapping[str, Sequence[int]], config: Mapping[str, object], where: str
) -> dict[str, LinearShape]:
    """Path -> shape of the stacks that checkpoints hold as tensors `[experts, ...]` of all experts of a block.

    `tensors` are names with their dimensions. Weights are `[experts, out, in]`, or `[experts, in, out]` where the side
    that config.json calls hidden_size says so. Raises ModelError QH-M50 as `joined`.
    """
    blocks: dict[str, dict[str, Sequence[int]]] = {}
    for name, dimensions in tensors.items():
        if len(dimensions) == 3 and (place := joined_place(name)):
            block, projection = place
            blocks.setdefault(block, {})[projection] = dimensions
    found: dict[str, LinearShape] = {}
    for block, weights in blocks.items():
        if len(weights) < 2 or weights["gate_up_proj"][0] < 2:
            continue
        count, *sides = weights["gate_up_proj"]
        hidden = config.get("hidden_size")
        is_transposed = sides[0] == hidden and sides[1] != hidden
        inputs, both = sides if is_transposed else reversed(sides)
        _check_count(block, count, config, where)
        for projection in GATE_AND_UP[0]:
            found[f"{block}.{projection}"] = LinearShape(inputs, both // 2, count)
        found[f"{block}.down_proj"] = LinearShape(both // 2, inputs, count)
    return found


def refuse_nonsense(shapes: Iterable[LinearShape], config: Mapping[str, object], where: str) -> None:
    """Raises ModelError QH-M50 for numbers in config.json by which no token could be sent to experts, with their key:
    transformers builds such a model, and fails over the first batch, or sends tokens elsewhere."""
    count = max((shape.experts for shape in shapes), default=1)
    if count == 1:
        return
    groups = config.get("n_group")
    known: dict[str, tuple[int, int | None]] = {
        **dict.fromkeys(COUNT_KEYS, (1, None)),
        **dict.fromkeys(PER_TOKEN_KEYS, (1, count)),
        "n_group": (1, count),
        "topk_group": (1, groups if type(groups) is int and groups > 0 else None),
        "decoder_sparse_step": (1, None),
        "first_k_dense_replace": (0, None),
        "n_shared_experts": (0, None),
    }
    for key, (least, most) in known.items():
        value = config.get(key)
        if type(value) is int and not least <= value <= (value if most is None else most):
            limits = f"from {least} to {most}" if most is not None else f"of {least} or more"
            raise _nonsense(f"{key} is {value}; a whole number {limits} is expected", where)
    if type(groups) is int and count % groups:
        raise _nonsense(f"n_group is {groups}, which does not divide {count} experts", where)


def _nonsense(what: str, where: str) -> ModelError:
    return ModelError(
        "QH-M50",
        f"config.json describes no mixture that could compute: {what}.",
        where=where,
        fix="Get config.json again from the model's source.",
    )


def missing_parts(targets: Iterable[str], linear_modules: Mapping[str, LinearShape]) -> list[str]:
    """Stacks that are no targets, while what cannot be adapted without them is: gate and up projection go with
    each other and with the projection that follows."""
    chosen = set(targets)
    found: set[str] = set()
    for module in chosen:
        if linear_modules[module].experts > 1 and (other := paired_with(module)):
            block, _, projection = module.rpartition(".")
            found |= {other, f"{block}.{'w2' if projection in ('w1', 'w3') else 'down_proj'}"}
    return sorted(found & linear_modules.keys() - chosen)


def _stacked(stack: str, members: Mapping[int, LinearShape], config: Mapping[str, object], where: str) -> LinearShape:
    count = len(members)
    if absent := sorted(set(range(max(members) + 1)) - set(members)):
        raise ModelError(
            "QH-M50",
            f"Expert {absent[0]} of {stack} is not stored; {count} others are, up to number {max(members)}.",
            where=where,
            fix="Get the model again from its source, all files from one revision.",
        )
    shapes = sorted(set(members.values()), key=lambda shape: shape.weight)
    if len(shapes) > 1:
        raise ModelError(
            "QH-M50",
            f"The experts of {stack} have weights of different shapes: {list(shapes[0].weight)} and "
            f"{list(shapes[1].weight)}; one shape is expected.",
            where=where,
            fix="Get the model again from its source, all files from one revision.",
        )
    _check_count(stack, count, config, where)
    return replace(shapes[0], experts=count)


def _check_count(stack: str, count: int, config: Mapping[str, object], where: str) -> None:
    claimed = {key: value for key in COUNT_KEYS if type(value := config.get(key)) is int}
    if claimed and count not in claimed.values():
        key, value = next(iter(claimed.items()))
        raise ModelError(
            "QH-M50",
            f"{stack} has {count} experts; by config.json ({key}) there are {value}.",
            where=where,
            fix="Check that config.json belongs to these weights.",
        )
