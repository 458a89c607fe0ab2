"""The merged model's tensors: which there are, and the value of each when its turn to be written comes.

A merged weight is W + scale * B A (Hu et al. 2021, section 4.1): the product in float64, the sum in float32, one
rounding to the output's dtype. One tensor is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.values import Adapter, Float32, LinearShape
from qlora_hal.errors import ConfigError, ModelError, NumericsError
from qlora_hal.export.rounding import DTYPE_BYTES, SAFETENSORS_DTYPE, is_finite, rounded
from qlora_hal.files.safetensors_file import TensorEntry
from qlora_hal.formats.packed_modules import PackedModules
from qlora_hal.model.expert_stacks import GATE_AND_UP, INTERLEAVED, halves_of, joined_place, layer_in, place_of
from qlora_hal.model.facts import ModelFacts
from qlora_hal.model.safetensors_headers import Header
from qlora_hal.model.shards import Array, PlannedTensor
from qlora_hal.model.stored_dtypes import FLOATING_DTYPES

BaseWeight = Callable[[str], Float32]
"""Module path -> its base weight `[out, in]` in float32, in an array of the caller's own; of one expert by the path
that its layer has in files with a tensor for each, of a stack `[experts, out, in]`."""

_ROWS_AT_A_TIME_BYTES = 64 * 2**20
_NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergedTensor(PlannedTensor):
    """A tensor of the merged model. `module` is the linear layer whose weight it is, else ""."""

    module: str = ""


def experts_in_one_tensor(name: str) -> ConfigError:
    """The refusal of a layout of experts that cannot be written packed."""
    return ConfigError(
        "QH-C62",
        f"{name} holds all experts of a block in one tensor; they are packed one by one, under names of their own.",
        fix="Use the model as the hub has it, with a tensor for each expert.",
        context={"modules": [name]},
    )


class BaseFiles:
    """The tensors of a base's weight files, each read when asked for."""

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self._places: dict[str, tuple[Path, TensorEntry]] = {
            name: (header.path, entry) for header in headers for name, entry in header.tensors.items()
        }

    def stored(self, name: str) -> Array:
        """As stored; bfloat16 as its 16 bits. Raises ModelError QH-C72 for a dtype that numpy does not have."""
        path, entry = self._places[name]
        if entry.dtype not in _NUMPY_DTYPES:
            raise ModelError(
                "QH-C72",
                f"{name} of the model is stored as {entry.dtype}, which cannot be merged.",
                where=str(path),
                fix="Merge into the model's 16-bit version.",
            )
        dtype = np.dtype(_NUMPY_DTYPES[entry.dtype])
        flat = np.fromfile(path, dtype=dtype, count=math.prod(entry.shape), offset=entry.begin)
        return flat.reshape(entry.shape)

    def float32(self, name: str) -> Float32:
        """A floating-point tensor in float32, in an array of the caller's own; exact for 16-bit ones."""
        stored = self.stored(name)
        if self._places[name][1].dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def stack(self, module: str, *, in_turns: bool) -> Float32:
        """A stack of experts `[experts, out, in]` out of the tensor of its whole block, gate before up; `in_turns`, of
        gpt-oss's `[experts, in, out]`."""
        block, _, projection = module.rpartition(".")
        halves = GATE_AND_UP[0]
        joined = (block, "gate_up_proj" if projection in halves else projection)
        whole = self.float32(next(name for name in self._places if joined_place(name) == joined))
        rows = np.swapaxes(whole, 1, 2) if in_turns else whole
        if projection in halves:
            place = halves.index(projection)
            rows = rows[:, place::2] if in_turns else np.split(rows, 2, axis=1)[place]
        return np.ascontiguousarray(rows)


class MergedModel:
    """The merged tensors of one base. `base_weight` gives the weights that the adapter is added to, `linear_modules`
    (path -> (in, out)) the layers it is asked for; every other tensor comes from the files."""

    def __init__(
        self,
        facts: ModelFacts,
        files: BaseFiles,
        adapter: Adapter,
        linear_modules: Mapping[str, LinearShape],
        base_weight: BaseWeight,
        dtype: str,
    ) -> None:
        self._facts = facts
        self._files = files
        self._adapter = adapter
        self._linears = linear_modules
        self._base_weight = base_weight
        self._targets = frozenset(adapter.config.target_modules)
        self._packed = PackedModules.of(facts)
        self._dtype = dtype

    def tensors(self) -> tuple[MergedTensor, ...]:
        """All tensors, in the order of the base's files. Raises ConfigError QH-C62 when an adapted layer is stored
        under another name than the loaded model has for it: its adapter would be left out."""
        planned = [self._planned(name) for name in self._facts.tensors if name not in self._packed.belongings]
        written = {place.module if (place := place_of(tensor.module)) else tensor.module for tensor in planned}
        written |= {stack for tensor in planned for stack in halves_of(tensor.module, self._linears)}
        absent = sorted(self._targets - written)
        if absent:
            raise ConfigError(
                "QH-C62",
                f"{len(absent)} adapted layers are stored under other names than the loaded model has for them "
                f"({absent[0]}); a merge writes tensors under their stored names.",
                fix="Use the adapter with its base, or save the base again with the model library that renames it.",
                context={"modules": absent},
            )
        return tuple(planned)

    def value(self, tensor: MergedTensor) -> Array:
        """What is written for it. Raises NumericsError QH-C63 when the output's dtype cannot hold it."""
        if tensor.module:
            return self._rounded(tensor.name, self._merged(tensor.module))
        if tensor.dtype != SAFETENSORS_DTYPE[self._dtype] or self._facts.tensors[tensor.name].dtype == tensor.dtype:
            return self._files.stored(tensor.name)
        return self._rounded(tensor.name, self._files.float32(tensor.name))

    def _planned(self, name: str) -> MergedTensor:
        stored = self._facts.tensors[name]
        module = self._packed.module_of_weight(name) or name.removesuffix(".weight")
        if (module != name or stored.dtype in FLOATING_DTYPES) and (shape := self._shape_of_block(module)):
            return self._floating(module if module in self._packed.modules else name, shape, module)
        if module in self._packed.modules or (module != name and layer_in(self._linears, module) is not None):
            linear = self._shape(module)
            return self._floating(f"{module}.weight", linear.weight, module)
        if stored.dtype in FLOATING_DTYPES:
            return self._floating(name, stored.shape, "")
        return MergedTensor(name, stored.dtype, stored.shape, stored.byte_count)

    def _shape(self, module: str) -> LinearShape:
        return layer_in(self._linears, module) or self._packed.shape(module, self._facts)

    def _shape_of_block(self, module: str) -> tuple[int, ...]:
        """The dimensions of a tensor that holds all experts of a block, not packed: `[experts, out, in]`, gate before
        up, or gpt-oss's `[experts, in, out]`; empty for any other tensor, and for one that is stored otherwise."""
        stacks = [self._linears[stack] for stack in halves_of(module, self._linears)]
        if not stacks:
            return ()
        sides = (sum(stack.outputs for stack in stacks), stacks[0].inputs)
        shape = (stacks[0].experts, *(reversed(sides) if self._in_turns else sides))
        stored = self._facts.tensors.get(module) or self._facts.tensors.get(f"{module}.weight")
        return shape if stored is None or stored.shape == shape else ()

    @property
    def _in_turns(self) -> bool:
        return self._facts.model_type in INTERLEAVED

    def _floating(self, name: str, shape: tuple[int, ...], module: str) -> MergedTensor:
        size = math.prod(shape) * DTYPE_BYTES[self._dtype]
        return MergedTensor(name, SAFETENSORS_DTYPE[self._dtype], shape, size, module)

    def _merged(self, module: str) -> Float32:
        if stacks := halves_of(module, self._linears):
            parts = [self._merged_stack(stack) for stack in stacks]
            return _in_turns(parts) if self._in_turns else np.concatenate(parts, axis=1)
        if layer_in(self._linears, module) is None:
            return self._packed.decoded(module, self._files.stored, self._files.float32, self._facts)
        weight, place = self._base_weight(module), place_of(module)
        if place is not None and place.module in self._targets:
            self._add(weight, place.module, place.number)
        elif module in self._targets:
            self._add(weight, module)
        return weight

    def _merged_stack(self, stack: str) -> Float32:
        weight = self._base_weight(stack)
        if stack in self._targets:
            for number, one in enumerate(weight):
                self._add(one, stack, number)
        return weight

    def _add(self, weight: Float32, module: str, expert: int | None = None) -> None:
        a, b = self._adapter.tensors[lora_a_key(module)], self._adapter.tensors[lora_b_key(module)]
        if expert is not None:
            a, b = a[expert], b[expert]
        add_product(weight, a, b, self._adapter.config.scale)

    def _rounded(self, name: str, values: Float32) -> Array:
        stored = rounded(values, self._dtype)
        if is_finite(stored, self._dtype):
            return stored
        largest = float(np.nanmax(np.abs(values), initial=0.0))
        raise NumericsError(
            "QH-C63",
            f"{name} would hold values that are not finite in {self._dtype}; its largest value is {largest:.3g}.",
            cause="float16 ends at 65504." if np.isfinite(values).all() else "The base or the adapter is damaged.",
            fix="Merge into bfloat16 or float32."
            if self._dtype == "float16"
            else "Get the base and the adapter again.",
            context={"tensor": name, "largest": largest},
        )


def _in_turns(stacks: Sequence[Float32]) -> Float32:
    """Stacks `[experts, out, in]` as gpt-oss has them: `[experts, in, out]`, outputs of one and another in turns."""
    experts, outputs, inputs = stacks[0].shape
    whole = np.empty((experts, inputs, outputs * len(stacks)), np.float32)
    for place, stack in enumerate(stacks):
        whole[:, :, place :: len(stacks)] = np.swapaxes(stack, 1, 2)
    return whole


def add_product(weight: Float32, a: Float32, b: Float32, scale: float) -> None:
    """Add scale * B A to `weight` `[out, in]` in place; `a` is `[r, in]`, `b` `[out, r]`. The product is made in
    float64, some rows at a time, and enters the sum as float32."""
    wide_a = a.astype(np.float64)
    rows = max(1, _ROWS_AT_A_TIME_BYTES // (8 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        weight[part] += ((scale * b[part].astype(np.float64)) @ wide_a).astype(np.float32)
