"""Pre-quantized checkpoints: which tensors are the packed weight of a module, and which only describe one.

What a backend trains on comes from its `dequantized_weight`. MLX checkpoints pack the embedding and the head as well,
which no backend's view covers; those are decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.model.facts import ModelFacts

_MARKS: Mapping[str, tuple[str, ...]] = {
    # Tensors beside a packed weight; the first is there for every packed module.
    "bitsandbytes": (
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
        ".weight.quant_state.bitsandbytes__fp4",
    ),
    "bitsandbytes int8": (".SCB", ".weight_format"),
    "gptq": (".scales", ".qzeros", ".g_idx"),
    "mlx": (".scales", ".biases"),
}
_ROWS_AT_A_TIME = 1024
_PACKED_WEIGHT: Mapping[str, str] = {"gptq": ".qweight"}


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
        kind = (
            f"{stored.method} int8"
            if (stored.method, stored.weight_format) == ("bitsandbytes", "int8")
            else stored.method
        )
        marks = _MARKS[kind]
        modules = frozenset(name.removesuffix(marks[0]) for name in facts.tensors if name.endswith(marks[0]))
        belongings = frozenset(module + mark for module in modules for mark in marks) & facts.tensors.keys()
        return cls(modules, belongings, _PACKED_WEIGHT.get(kind, ".weight"))

    def module_of_weight(self, name: str) -> str:
        """The packed module whose weight the tensor is, or ""."""
        module = name.removesuffix(self.weight_suffix)
        return module if module != name and module in self.modules else ""

    def shape(self, module: str, facts: ModelFacts) -> LinearShape:
        """That of a packed MLX module."""
        assert facts.prequantized is not None
        assert facts.prequantized.block_size is not None
        rows, groups = facts.tensors[f"{module}.scales"].shape
        return LinearShape(groups * facts.prequantized.block_size, rows)

    def decoded(
        self,
        module: str,
        stored: Callable[[str], npt.NDArray[Any]],
        as_float32: Callable[[str], Float32],
        facts: ModelFacts,
    ) -> Float32:
        """The weight `[out, in]` of a packed MLX module: scale * code + bias per group; the codes of a row are a stream
        of bits from the low end (mlx 0.32, `mx.quantize`). Raises ModelError QH-C72 for a mode other than affine."""
        assert facts.prequantized is not None
        settings = facts.prequantized.settings
        if settings.get("mode", "affine") != "affine":
            raise ModelError(
                "QH-C72",
                f"{module} is stored as {facts.prequantized.weight_format}, which is decoded for linear layers only.",
                fix="Merge into the unquantized version of the model, with --base original.",
            )
        bits = int(str(settings["bits"]))
        words = stored(f"{module}.weight")
        scales, biases = as_float32(f"{module}.scales"), as_float32(f"{module}.biases")
        inputs = words.shape[1] * 32 // bits
        weight = np.empty((len(words), scales.shape[1], inputs // scales.shape[1]), np.float32)
        for start in range(0, len(words), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            weight[part] = _codes(words[part], bits).reshape(weight[part].shape)
            weight[part] = weight[part] * scales[part, :, None] + biases[part, :, None]
        return weight.reshape(len(words), inputs)


def _codes(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """uint32 words `[rows, n]` -> codes `[rows, n * 32 / bits]`."""
    stream = np.unpackbits(np.ascontiguousarray(words, dtype="<u4").view(np.uint8), axis=1, bitorder="little")
    planes = stream.reshape(len(words), -1, bits)
    codes: npt.NDArray[np.uint8] = (planes << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return codes
