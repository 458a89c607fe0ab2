"""Whether a record says of its format what its codec does: shown on small weights, before anyone relies on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from qlora_hal.contract.type_checks import wrong_fields
from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.files.safetensors_file import TensorEntry, dtype_name
from qlora_hal.formats.record import (
    LEVELS,
    Array,
    CheckpointLayout,
    FormatRecord,
    StoredCheckpoint,
    UnreadableFormatError,
)

OUTPUTS = 16
"""Rows of the weights that are tried: as many as the packed columns of any format here need."""
MODULE = "model.layers.0.mlp.up_proj"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def contradictions(record: FormatRecord) -> list[str]:
    """One phrase for each thing that is wrong; none for a record that is what its codec does. Raises what the codec
    and the layout raise."""
    return wrong_fields(record) or list(_wrong_data(record)) or list(_wrong_codec(record))


def _wrong_data(record: FormatRecord) -> Iterator[str]:
    if not _NAME.fullmatch(record.name):
        yield f"the name {record.name!r} is not made of lower case letters, digits and single underscores"
    if record.level not in (*LEVELS, ""):
        yield f"level {record.level!r} is none of {', '.join(LEVELS)}"
    if record.bits <= 0:
        yield f"{record.bits} bits are no width"
    if any(size <= 0 for size in record.block_sizes) or len(set(record.block_sizes)) < len(record.block_sizes):
        yield f"block_sizes {record.block_sizes} are not different positive numbers"


def _wrong_codec(record: FormatRecord) -> Iterator[str]:
    for size in record.block_sizes or (None,):
        for double_quant in (False, True) if record.double_quant else (False,):
            where = f" in blocks of {size}" if size else ""
            where += " with double quantization" if double_quant else ""
            for wrong in _wrong_storage(record, size, double_quant):
                yield wrong + where


def _wrong_storage(record: FormatRecord, size: int | None, double_quant: bool) -> Iterator[str]:
    weight = _drawn(size)
    shape = LinearShape(weight.shape[1], weight.shape[0])
    stored = record.codec.quantize(weight, size, double_quant)
    decoded = record.codec.dequantize(stored)
    if decoded.shape != weight.shape:
        yield f"its codec decodes a weight {list(weight.shape)} to {list(decoded.shape)}"
        return
    bound = record.codec.error_bound(weight, size, double_quant)
    if bound is None and not record.calibrated:
        yield "its codec has no error bound, and it is not calibrated"
    if bound is not None and not (np.abs(decoded - weight) <= bound).all():
        worst = float(np.nanmax(np.abs(decoded - weight) - bound, initial=0.0))
        yield f"its codec's weights are outside its own error bound, by up to {worst:.3g}"
    if record.layout is not None:
        yield from _wrong_sizes(record, record.layout, shape, size, double_quant, stored)
        yield from _wrong_reading(record, record.layout, shape, size, double_quant, stored)


def _wrong_sizes(
    record: FormatRecord,
    layout: CheckpointLayout,
    shape: LinearShape,
    size: int | None,
    double_quant: bool,
    stored: Mapping[str, Array],
) -> Iterator[str]:
    unknown = sorted(stored.keys() - layout.suffixes)
    if unknown or not {layout.weight, layout.marks[0]} <= stored.keys():
        yield f"its codec stores {', '.join(sorted(stored))}; its layout has {', '.join(sorted(layout.suffixes))}"
        return
    codes = stored[layout.weight].nbytes
    if codes != math.ceil(shape.parameters * record.bits / 8):
        yield f"bits is {record.bits}, but its codec packs {shape.parameters} weights into {codes} bytes"
    taken = sum(tensor.nbytes for suffix, tensor in stored.items() if suffix not in layout.constant)
    counted = record.bytes_of(shape, size, double_quant, compute_bytes=4)
    if counted != taken:
        sides = f"{shape.outputs} x {shape.inputs}"
        yield f"packed_bytes counts {counted} bytes for {sides} weights; its codec's take {taken}"


def _wrong_reading(
    record: FormatRecord,
    layout: CheckpointLayout,
    shape: LinearShape,
    size: int | None,
    double_quant: bool,
    stored: Mapping[str, Array],
) -> Iterator[str]:
    if layout.recognizes(_checkpoint({}, {".weight": np.zeros((OUTPUTS, OUTPUTS), np.float32)})):
        yield "its layout takes ordinary weights for its own"
    checkpoint = _checkpoint(record.codec.description(size, double_quant), stored)
    if not layout.recognizes(checkpoint):
        yield "its layout does not recognize what its codec stores"
        return
    try:
        packing = layout.read(checkpoint)
    except (ModelError, UnreadableFormatError) as error:
        yield f"its layout refuses what its codec stores ({str(getattr(error, 'message', error)).rstrip('.')})"
        return
    found = packing.prequantized
    read = (found.weight_format, found.block_size, found.double_quant, dict(packing.shapes))
    if read != (record.name, size, double_quant, {MODULE: shape}):
        yield f"its layout reads what its codec stores as {found.weight_format} with {dict(packing.shapes)}"


def _drawn(size: int | None) -> Float32:
    """A weight of two blocks and more to a row. Its last row is zeros: a scale of 0 shows there."""
    weight = np.random.default_rng(0).normal(size=(OUTPUTS, 2 * math.lcm(size or 32, 32))).astype(np.float32)
    weight[-1] = 0.0
    return weight


def _checkpoint(description: Mapping[str, object], stored: Mapping[str, Array]) -> StoredCheckpoint:
    """A checkpoint of one module, as its headers and its config.json would tell of it."""
    arrays = {MODULE + suffix: tensor for suffix, tensor in stored.items()}
    return StoredCheckpoint(
        "the record's own codec",
        description,
        {name: TensorEntry(dtype_name(array.dtype), array.shape, 0, array.nbytes) for name, array in arrays.items()},
        lambda name: arrays[name].tobytes(),
        lambda name: None,
    )
