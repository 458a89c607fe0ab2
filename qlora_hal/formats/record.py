"""A weight format as one record: what it is called, what it costs, what its checkpoints look like, what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.files.safetensors_file import TensorEntry
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.codecs import Codec

Array = npt.NDArray[Any]

LEVELS = ("none", "8bit", "4bit")
"""The portable levels of quantization, from the largest to the smallest."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """What a layout may look at: config.json, the headers of the weight files and small files; no weight.

    `read_bytes` gives the content of a tensor that describes others (UnsafeInputError QH-C15 above 64 KiB), `read_json`
    that of a file of the folder, None where it is absent.
    """

    where: str
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]
    read_bytes: Callable[[str], bytes]
    read_json: Callable[[str], Mapping[str, object] | None]

    @property
    def quant_method(self) -> str:
        """What `quantization_config` calls the method; "" where config.json has none."""
        described = self.config.get("quantization_config")
        return str(described.get("quant_method", "")) if isinstance(described, dict) else ""

    def modules_with(self, suffix: str) -> list[str]:
        """The modules that have a tensor of this suffix, in the order of the files."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError QH-C73 for a tensor that is not there."""
        if name not in self.tensors:
            raise self.contradiction(f"{name} is missing")
        return self.tensors[name].shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sides of a tensor. Raises ModelError QH-C73 for one that is not there or has other dimensions."""
        shape = self.shape(name)
        if len(shape) != 2:
            raise self.contradiction(f"{name} has shape {list(shape)}, two sides are expected")
        return shape[0], shape[1]

    def whole(self, name: str, value: object) -> int:
        """A positive whole number of a description. Raises ModelError QH-C73 for anything else."""
        if type(value) is not int or value <= 0:
            raise self.contradiction(f"{name} holds {value!r} where a positive whole number is expected")
        return value

    def contradiction(self, what: str) -> ModelError:
        """The error QH-C73 for tensors that are not those of the description."""
        return ModelError(
            "QH-C73",
            f"The checkpoint contradicts its own description: {what}.",
            where=self.where,
            fix="Get the model again from its source, all files from one revision.",
        )


class UnreadableFormatError(Exception):
    """A layout knows the checkpoint and does not read it. `what` completes `The model is ...`; `cause` and `fix` are
    for the user, where the layout has better ones than `name the unquantized version`."""

    def __init__(self, what: str, *, cause: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.cause, self.fix = what, cause, fix


@dataclass(frozen=True, slots=True)
class Packing:
    """A recognised quantization; `shapes` are the true shapes of packed modules."""

    prequantized: Prequantized
    shapes: Mapping[str, LinearShape]


class DecodesModule(Protocol):
    """Decodes a packed module that is no linear layer with an adapter (an embedding, a head), which no backend's view
    covers: float32 `[out, in]`. `stored` and `as_float32` give tensors by name."""

    def __call__(
        self,
        module: str,
        stored: Callable[[str], Array],
        as_float32: Callable[[str], Float32],
        packed: Prequantized,
    ) -> Float32: ...


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """How folders hold weights of a format, or of the several formats of one library.

    `method` is the library's name for it. `recognizes` says whether a checkpoint is stored so; `read` then gives the
    format, its settings and the true shapes, or raises ModelError QH-C73 (a contradiction) or UnreadableFormatError.
    `weight` is the suffix of the packed weight, `marks` are those of the tensors beside it; the first mark is there for
    every packed module. `constant` are marks whose size does not depend on the weight: no part of what it costs.
    `decode` is for formats in which modules without an adapter are packed too. `on_load`: the description may stand
    over ordinary weights, which the library quantizes while it loads them.
    """

    method: str
    recognizes: Callable[[StoredCheckpoint], bool]
    read: Callable[[StoredCheckpoint], Packing]
    marks: tuple[str, ...]
    weight: str = ".weight"
    constant: tuple[str, ...] = ()
    decode: DecodesModule | None = None
    on_load: bool = False

    @property
    def suffixes(self) -> frozenset[str]:
        """Of all tensors that a packed module may have."""
        return frozenset({self.weight, *self.marks})


class PackedBytes(Protocol):
    """Bytes of one packed weight with its scales. `block_size` is 0 where a format has no blocks; `compute_bytes` are
    those of a number in the compute dtype, in which some formats keep their scales."""

    def __call__(self, inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int: ...


@dataclass(frozen=True, slots=True)
class PackedWriter:
    """Writes the modules of a whole model, one at a time, with the codec's numbers. `dtype` is what they decode to.

    `shapes(module, shape, dtype)` gives tensor name -> (safetensors dtype, dimensions), `tensors(module, weight,
    dtype)` the same names -> arrays, and `description(dtype)` the `quantization_config` of the folder.
    """

    shapes: Callable[[str, LinearShape, str], Mapping[str, tuple[str, tuple[int, ...]]]]
    tensors: Callable[[str, Float32, str], Mapping[str, Array]]
    description: Callable[[str], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class FormatRecord:
    """One weight format.

    `level` is the portable level that a user gets it by, "" where it must be named. `bits` are those of one code,
    `packed_bytes` counts the scales too. `block_sizes` are all that exist, the default first; none: no blocks.
    `within_rows`: blocks end with the row, and must divide it. `double_quant`: the scales can be quantized too.
    `calibrated`: a solver chooses the codes with the help of rows of data, before the model is loaded.
    `codec` is what the format means: a backend is judged by it. `layout` is None where nothing is packed; it is what
    the codec writes, and `further_layouts` are those of other libraries that hold the same numbers. With a `writer` the
    core itself brings a merged model into the format.
    """

    name: str
    title: str
    level: str
    bits: int
    codec: Codec
    packed_bytes: PackedBytes
    layout: CheckpointLayout | None
    block_sizes: tuple[int, ...] = ()
    within_rows: bool = False
    double_quant: bool = False
    calibrated: bool = False
    writer: PackedWriter | None = None
    further_layouts: tuple[CheckpointLayout, ...] = ()

    @property
    def layouts(self) -> tuple[CheckpointLayout, ...]:
        return (*self.further_layouts,) if self.layout is None else (self.layout, *self.further_layouts)

    def layout_of(self, method: str) -> CheckpointLayout | None:
        """The layout of a library, by what `Prequantized.method` calls it."""
        return next((layout for layout in self.layouts if layout.method == method), self.layout)

    @property
    def weight_format(self) -> WeightFormat:
        return WeightFormat(self.name)

    @property
    def default_block(self) -> int | None:
        return self.block_sizes[0] if self.block_sizes else None

    @property
    def holding_level(self) -> str:
        """The portable level that holds no less than this format."""
        if self.level == "none":
            return "none"
        return "4bit" if self.bits <= 4 else "8bit"

    def require_whole_blocks(self, module: str, inputs: int, block_size: int | None, where: str) -> None:
        """Raises ModelError QH-M53 where blocks must divide the rows of a layer and do not."""
        if self.within_rows and block_size and inputs % block_size:
            raise ModelError(
                "QH-M53",
                f"{module} has rows of {inputs} weights, which groups of {block_size} do not divide.",
                where=where,
                fix=f"Set {self._way_to_whole_blocks(inputs)}quantization.weight_format to another format, or to none.",
            )

    def _way_to_whole_blocks(self, inputs: int) -> str:
        fitting = [size for size in self.block_sizes if inputs % size == 0]
        return f"quantization.block_size to {max(fitting)}, or " if fitting else ""

    def bytes_of(
        self, shape: LinearShape, block_size: int | None = None, double_quant: bool = False, compute_bytes: int = 2
    ) -> int:
        """Bytes of a weight of this shape with its scales, by default in blocks of the default size."""
        size = block_size or self.default_block or 0
        return shape.experts * self.packed_bytes(shape.inputs, shape.outputs, size, double_quant, compute_bytes)
