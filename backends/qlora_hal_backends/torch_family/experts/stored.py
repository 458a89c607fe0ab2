"""Which stored tensors hold which expert's weight, by transformers' table of conversions: one tensor for each expert's
projection, or all experts of a block in one, gate and up projection joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.gpt_oss import BLOCKS, SCALES
from qlora_hal.model.expert_stacks import GATE_AND_UP, joined_place, place_of
from qlora_hal_backends.torch_family.experts.block import RoutedExperts
from qlora_hal_backends.torch_family.experts.stack import ExpertStack
from qlora_hal_backends.torch_family.microscaling import GROUP_SIZE

if TYPE_CHECKING:
    from qlora_hal_backends.torch_family.transformers_versions import NameInModel

HALVES = ("gate", "up")
_WEIGHTS = frozenset({"gate_up_proj", "down_proj"})
_PLAIN_OPERATIONS = frozenset({"MergeModulelist", "Concatenate"})
"""What the table does where each stored tensor is one expert's weight as it is."""


@dataclass(slots=True)
class StoredProjection:
    """Where the weights of one stack are: `paths` number -> layer, one for each expert, or `joined`, one tensor, of
    which `is_packed` says that it is gpt-oss's two of bytes."""

    stack: str = ""
    paths: dict[int, str] = field(default_factory=dict)
    joined: str = ""
    is_packed: bool = False


class ExpertNames:
    """Filled with every stored tensor; then it knows the stacks of each block."""

    def __init__(self, blocks: Mapping[str, RoutedExperts]) -> None:
        self.blocks = blocks
        self.projections: dict[tuple[str, str], StoredProjection] = {
            (path, half): StoredProjection() for path in blocks for half in (*HALVES, "down")
        }

    def takes(self, layer: str, found: NameInModel, *, is_packed: bool = False) -> bool:
        """Whether a tensor is an expert's. `layer` is its name in the files without `.weight`, `found` what the model
        library makes of it; `is_packed`: it is part of gpt-oss's bytes."""
        block, _, weight = found.name.removesuffix(".weight").rpartition(".")
        if not self.holds(found.name):
            return False
        place = place_of(layer)
        if place is not None and found.is_converted and _PLAIN_OPERATIONS.issuperset(found.operations):
            half = HALVES[found.place] if weight == "gate_up_proj" else "down"
            projection = self.projections[block, half]
            projection.stack = place.module
            projection.paths[place.number] = layer
            return True
        joined = joined_place(layer)
        if found.is_converted or joined is None:
            return False
        stored_block, _ = joined
        halves = list(zip(HALVES, GATE_AND_UP[0], strict=True)) if weight == "gate_up_proj" else [("down", weight)]
        # Stored twice, nothing says which is meant. Names with numbers come first.
        if any(self.projections[block, half].paths for half, _ in halves):
            return False
        for half, leaf in halves:
            projection = self.projections[block, half]
            projection.stack, projection.joined, projection.is_packed = f"{stored_block}.{leaf}", layer, is_packed
        return True

    def holds(self, name: str) -> bool:
        """Whether a tensor of this name in the model holds experts' weights; their biases are ordinary parameters."""
        block, _, weight = name.removesuffix(".weight").rpartition(".")
        return block in self.blocks and weight in _WEIGHTS

    def missing(self) -> Iterator[str]:
        """Names of weights that no stored tensor holds."""
        for (block, half), projection in self.projections.items():
            if not projection.joined:
                absent = set(range(self.blocks[block].experts)) - set(projection.paths)
                name = projection.stack or f"{block}.{half}_proj"
                yield from (f"{name}, expert {number}" for number in sorted(absent)[:1])

    def place_stacks(self) -> dict[str, ExpertStack]:
        """Give each block its stacks: path in the core -> stack."""
        stacks: dict[str, ExpertStack] = {}
        for path, block in self.blocks.items():
            outer, inner = block.sides
            for half, shape in (("gate", (outer, inner)), ("up", (outer, inner)), ("down", (inner, outer))):
                stack = ExpertStack(self.projections[path, half].stack, LinearShape(*shape, block.experts))
                setattr(block, half, stack)
                stacks[stack.name] = stack
        return stacks

    def expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Layer in the files -> the dimensions its weight must have."""
        for (path, half), projection in self.projections.items():
            block = self.blocks[path]
            outer, inner = block.sides
            for layer in projection.paths.values():
                yield layer, (outer, inner) if half == "down" else (inner, outer)
            if projection.joined:
                sides = (outer, inner) if half == "down" else (2 * inner, outer)
                if projection.is_packed:
                    groups = (block.experts, sides[0], sides[1] // GROUP_SIZE)
                    yield projection.joined + BLOCKS, (*groups, GROUP_SIZE // 2)
                    yield projection.joined + SCALES, groups
                    continue
                yield projection.joined, (block.experts, *(reversed(sides) if block.is_transposed else sides))
