"""Pre-quantized checkpoints: which tensors are the packed weight of a module, and which only describe one.

What a backend trains on comes from its `dequantized_weight`. MLX checkpoints pack the embedding and the head as well,
which no backend's view covers; those are decoded by the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.formats.catalogue import layout_of
from qlora_hal.model.facts import ModelFacts
from qlora_hal.model.packed_facts import Prequantized


@dataclass(frozen=True, slots=True)
class PackedModules:
    """The packed modules of a checkpoint, none in an ordinary one. `belongings` are tensors that only describe."""

    modules: frozenset[str] = frozenset()
    belongings: frozenset[str] = frozenset()
    weight_suffix: str = ".weight"

    @classmethod
    def of(cls, facts: ModelFacts) -> PackedModules:
        stored = facts.prequantized
        if stored is None:
            return cls()
        layout = layout_of(stored)
        assert layout is not None
        mark = layout.marks[0]
        modules = frozenset(name.removesuffix(mark) for name in facts.tensors if name.endswith(mark))
        belongings = frozenset(module + mark for module in modules for mark in layout.marks) & facts.tensors.keys()
        return cls(modules, belongings, layout.weight)

    def module_of_weight(self, name: str) -> str:
        """The packed module whose weight the tensor is, or ""."""
        module = name.removesuffix(self.weight_suffix)
        return module if module != name and module in self.modules else ""

    def shape(self, module: str, facts: ModelFacts) -> LinearShape:
        """That of a packed module that is no linear layer with an adapter: the groups of its rows tell it. Raises
        ModelError QH-C72 for a format that has none."""
        packed, scales = _packed(facts), facts.tensors.get(f"{module}.scales")
        if scales is None or packed.block_size is None:
            raise _only_linear_layers(module, packed)
        rows, groups = scales.shape
        return LinearShape(groups * packed.block_size, rows)

    def decoded(
        self,
        module: str,
        stored: Callable[[str], npt.NDArray[Any]],
        as_float32: Callable[[str], Float32],
        facts: ModelFacts,
    ) -> Float32:
        """The weight `[out, in]` of such a module. Raises ModelError QH-C72 for a format of which only linear layers
        are decoded."""
        packed = _packed(facts)
        layout = layout_of(packed)
        if layout is None or layout.decode is None:
            raise _only_linear_layers(module, packed)
        return layout.decode(module, stored, as_float32, packed)


def _packed(facts: ModelFacts) -> Prequantized:
    assert facts.prequantized is not None, "an ordinary checkpoint has no packed modules"
    return facts.prequantized


def _only_linear_layers(module: str, packed: Prequantized) -> ModelError:
    return ModelError(
        "QH-C72",
        f"{module} is stored as {packed.weight_format}, which is decoded for linear layers only.",
        fix="Merge into the unquantized version of the model, with --base original.",
    )
