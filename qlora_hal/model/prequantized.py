"""Checkpoints that are quantized already: how, and the true shapes behind their packed tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qlora_hal.errors import BackendContractError, ModelError, QloraHalError
from qlora_hal.errors.foreign import told
from qlora_hal.formats.catalogue import BUILT_IN, layouts
from qlora_hal.formats.record import CheckpointLayout, Packing, StoredCheckpoint, UnreadableFormatError
from qlora_hal.model.safetensors_headers import Header, read_tensor_bytes
from qlora_hal.model.weight_files import read_json


def read_packing(folder: Path, config: Mapping[str, object], headers: Sequence[Header]) -> Packing | None:
    """How a checkpoint is packed, or None for ordinary weights.

    Raises ModelError: QH-C72 for a method or width that no backend has, QH-C73 when description and tensors
    disagree.
    """
    checkpoint = _checkpoint(folder, config, headers)
    try:
        layout = _layout(checkpoint)
        if layout is None:
            return None
        packing = _read(layout, checkpoint)
    except UnreadableFormatError as error:
        raise ModelError(
            "QH-C72",
            f"The model is {error.what}; readable are {_readable()}.",
            where=str(folder),
            cause=error.cause,
            fix=error.fix or "Name the model's unquantized version; it is quantized while loading.",
        ) from error
    _refuse_second_weights(layout, packing, checkpoint)
    _refuse_stray_parts(layout, packing, checkpoint)
    return packing


def _layout(checkpoint: StoredCheckpoint) -> CheckpointLayout | None:
    """The first layout that knows the checkpoint; None for ordinary weights, also under the description of a library
    that quantizes while loading: the run's own configuration decides how."""
    for layout, formats in layouts().items():
        # One of a third party that fails on a checkpoint does not know it, and the next is asked. Ours must not fail.
        with suppress(*(() if formats[0] in BUILT_IN else (Exception,))):
            if layout.recognizes(checkpoint):
                return layout
    declared = checkpoint.quant_method
    if not declared or any(declared == layout.method for layout in layouts() if layout.on_load):
        return None
    raise UnreadableFormatError(f"quantized with {declared}")


def _read(layout: CheckpointLayout, checkpoint: StoredCheckpoint) -> Packing:
    """Raises BackendContractError QH-E80 where a third party's layout fails."""
    try:
        return layout.read(checkpoint)
    except (QloraHalError, UnreadableFormatError):
        raise
    except Exception as error:
        named = " or ".join(record.name for record in layouts()[layout])
        raise BackendContractError(
            "QH-E80",
            f"The weight format {named} does not read its own checkpoint: {told(error)}.",
            where=checkpoint.where,
            fix="Update the package that has the format; if that does not help, report this to its author.",
        ) from error


def _refuse_second_weights(layout: CheckpointLayout, packing: Packing, checkpoint: StoredCheckpoint) -> None:
    """A packed module has no other weight beside its own, plain or of another of our layouts: it would go unused.
    Raises ModelError QH-C73."""
    suffixes = {suffix for other, formats in layouts().items() if formats[0] in BUILT_IN for suffix in other.suffixes}
    for module in packing.shapes:
        found = sorted(suffix for suffix in suffixes - layout.suffixes if module + suffix in checkpoint.tensors)
        if found:
            raise checkpoint.contradiction(
                f"{module} is stored twice, as {module}{layout.weight} in {packing.prequantized.weight_format} and as "
                f"{module}{found[0]}"
            )


def _refuse_stray_parts(layout: CheckpointLayout, packing: Packing, checkpoint: StoredCheckpoint) -> None:
    """What describes a packed weight stands beside one. Raises ModelError QH-C73."""
    if layouts()[layout][0] not in BUILT_IN:
        return  # another name than ours may mean something else where nothing is packed
    for mark in layout.marks:
        stray = next((module for module in checkpoint.modules_with(mark) if module not in packing.shapes), None)
        if stray is not None:
            raise checkpoint.contradiction(
                f"{stray}{mark} describes a weight in {packing.prequantized.weight_format}, and {stray} has none"
            )


def _checkpoint(folder: Path, config: Mapping[str, object], headers: Sequence[Header]) -> StoredCheckpoint:
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    holders = {name: header for header in headers for name in header.tensors}
    return StoredCheckpoint(
        str(folder),
        config,
        tensors,
        lambda name: read_tensor_bytes(holders[name], name),
        lambda name: read_json(folder / name) if (folder / name).is_file() else None,
    )


def _readable() -> str:
    """`bitsandbytes (int8, nf4, fp4), gptq (int4_gptq), ...`."""
    formats: dict[str, list[str]] = {}
    for layout, records in layouts().items():
        formats.setdefault(layout.method, []).extend(record.name for record in records)
    return ", ".join(f"{method} ({', '.join(names)})" for method, names in formats.items())
