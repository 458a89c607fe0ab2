"""MLX's integers of 2 to 8 bits with a scale and a bias to a group, and the layout that all formats of MLX share.

A module has `weight` uint32 [out, in * bits / 32], `scales` and, in the affine mode, `biases` [out, in / group]
(mlx 0.32, `nn.quantize`). An embedding and a head are packed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.formats.record import (
    CheckpointLayout,
    FormatRecord,
    Packing,
    StoredCheckpoint,
    UnreadableFormatError,
)
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.codecs import MlxAffineCodec
from qlora_hal_oracle.microscaling import MicroscalingFormat
from qlora_hal_oracle.mlx_affine import CODE_BITS

GROUP_SIZES = (64, 32, 128)
_FLOATS = ("F32", "F16", "BF16")
_ROWS_AT_A_TIME = 1024


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return isinstance(checkpoint.config.get("quantization"), dict) and bool(checkpoint.modules_with(".scales"))


def _read(checkpoint: StoredCheckpoint) -> Packing:
    described = checkpoint.config["quantization"]
    assert isinstance(described, dict)
    _refuse_stacks(checkpoint)
    mode = described.get("mode", "affine")
    bits = checkpoint.whole("quantization.bits", described.get("bits"))
    group_size = checkpoint.whole("quantization.group_size", described.get("group_size"))
    weight_format = _format(mode, bits, group_size)
    _check_own_entries(checkpoint, described, (mode, bits, group_size))
    shapes = {
        module: _shape(checkpoint, module, bits, group_size, is_affine=mode == "affine")
        for module in checkpoint.modules_with(".scales")
    }
    settings = {"bits": bits, "group_size": group_size, "mode": mode}
    return Packing(Prequantized("mlx", weight_format, group_size, False, settings), shapes)


def _refuse_stacks(checkpoint: StoredCheckpoint) -> None:
    """mlx-lm's own mixtures have all experts of a layer in one packed tensor, and most of them a router in 8 bits
    beside experts in 4. Raises UnreadableFormatError."""
    for module in checkpoint.modules_with(".scales"):
        if len(checkpoint.shape(f"{module}.scales")) == 3:
            raise UnreadableFormatError(
                f"a mixture as mlx-lm stacks it, all experts of a layer in {module}",
                cause="Packed experts are read one by one, under the names of the hub.",
                fix="Name the model's original folder on the hub; it is quantized while loading.",
            )


def _format(mode: object, bits: int, group_size: int) -> str:
    """The format's name. A mode other than affine has one width and one group size of its own."""
    if mode == "affine" and bits in CODE_BITS:
        return f"int{bits}_affine"
    for kind in MicroscalingFormat:
        if (mode, bits, group_size) == (kind.value, kind.bits, kind.group_size):
            return kind.value
    raise UnreadableFormatError(f"quantized with MLX {mode} in {bits} bits and groups of {group_size}")


def _check_own_entries(
    checkpoint: StoredCheckpoint, described: Mapping[str, object], of_all: tuple[object, int, int]
) -> None:
    """What the description says of single modules: true, false, or a mode, bits and group size, each with MLX's default
    and not with those of all. Raises ModelError QH-C73 and UnreadableFormatError."""
    for module, own in described.items():
        if f"{module}.weight" not in checkpoint.tensors:
            continue  # a setting of all, or a module that is not stored under this name
        if not isinstance(own, bool | dict):
            raise checkpoint.contradiction(f"quantization.{module} holds {own!r:.60}")
        if (f"{module}.scales" in checkpoint.tensors) == (own is False):
            stored = "scales" if own is False else "no scales"
            raise checkpoint.contradiction(f"{module} has {stored}, quantization.{module} is {own!r:.80}")
        if isinstance(own, dict) and (_own(own) != of_all or own.get("quantize_input")):
            raise UnreadableFormatError(f"quantized in several ways ({module}: {_told(own)})")


def _own(own: Mapping[str, object]) -> tuple[object, object, object]:
    """(mode, bits, group size) of one module, with the defaults of mlx 0.32, `to_quantized`."""
    mode = own.get("mode", "affine")
    bits, group_size = next(
        ((kind.bits, kind.group_size) for kind in MicroscalingFormat if kind.value == mode), (4, GROUP_SIZES[0])
    )
    return mode, own.get("bits") or bits, own.get("group_size") or group_size


def _told(own: Mapping[str, object]) -> str:
    mode, bits, group_size = _own(own)
    inputs = ", with its inputs" if own.get("quantize_input") else ""
    return f"{mode!s:.40} in {bits!s:.40} bits and groups of {group_size!s:.40}{inputs}"


def _shape(checkpoint: StoredCheckpoint, module: str, bits: int, group_size: int, *, is_affine: bool) -> LinearShape:
    rows, words = checkpoint.matrix(f"{module}.weight")
    inputs = words * 32 // bits
    scales = _FLOATS if is_affine else ("U8",)
    parts = {".scales": scales, ".biases": scales} if is_affine else {".scales": scales}
    for part in parts:
        if inputs % group_size or checkpoint.shape(module + part) != (rows, inputs // group_size):
            raise checkpoint.contradiction(f"{module}{part} does not fit {bits} bits in groups of {group_size}")
    for part, dtypes in {".weight": ("U32",), **parts}.items():
        if (found := checkpoint.tensors[module + part].dtype) not in dtypes:
            raise checkpoint.contradiction(
                f"{module}{part} is stored as {found}; MLX packs a weight in U32, with scales in {' or '.join(scales)}"
            )
    if not is_affine and f"{module}.biases" in checkpoint.tensors:
        raise checkpoint.contradiction(f"{module} has biases, which only the affine mode has")
    if checkpoint.tensors.get(f"{module}.global_scale") is not None:
        raise UnreadableFormatError(f"quantized with a global scale ({module})")
    return LinearShape(inputs, rows)


def _decoded(
    module: str,
    stored: Callable[[str], npt.NDArray[Any]],
    as_float32: Callable[[str], Float32],
    packed: Prequantized,
) -> Float32:
    """scale * code + bias per group; the codes of a row are a stream of bits from the low end (mlx 0.32,
    `mx.quantize`)."""
    bits = int(str(packed.settings["bits"]))
    words = stored(f"{module}.weight")
    scales, biases = as_float32(f"{module}.scales"), as_float32(f"{module}.biases")
    inputs = words.shape[1] * 32 // bits
    weight = np.empty((len(words), scales.shape[1], inputs // scales.shape[1]), np.float32)
    for start in range(0, len(words), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        weight[part] = codes_of(words[part], bits).reshape(weight[part].shape)
        weight[part] = weight[part] * scales[part, :, None] + biases[part, :, None]
    return weight.reshape(len(words), inputs)


def codes_of(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """uint32 words `[rows, n]` -> codes `[rows, n * 32 / bits]`."""
    stream = np.unpackbits(np.ascontiguousarray(words, dtype="<u4").view(np.uint8), axis=1, bitorder="little")
    planes = stream.reshape(len(words), -1, bits)
    codes: npt.NDArray[np.uint8] = (planes << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return codes


LAYOUT = CheckpointLayout("mlx", _recognizes, _read, (".scales", ".biases"), decode=_decoded)


def _affine(bits: int, level: str) -> FormatRecord:
    def packed_bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
        """The codes, and a scale and a bias to a group in the model's dtype."""
        groups = math.ceil(inputs / block_size) * outputs
        return inputs * outputs * bits // 8 + groups * 2 * compute_bytes

    return FormatRecord(
        name=f"int{bits}_affine",
        title=f"MLX: {bits}-bit integers, per-group scale and bias",
        level=level,
        bits=bits,
        codec=MlxAffineCodec(bits),
        packed_bytes=packed_bytes,
        layout=LAYOUT,
        block_sizes=GROUP_SIZES,
        within_rows=True,
    )


MLX_AFFINE = (
    _affine(2, level=""),
    _affine(3, level=""),
    _affine(4, level="4bit"),
    _affine(5, level=""),
    _affine(6, level=""),
    _affine(8, level="8bit"),
)
