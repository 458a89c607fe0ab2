"""NF4 and FP4: a codebook of 16 entries with an absmax to a block (QLoRA, Dettmers et al. 2023), by bitsandbytes.

Each packed weight is a column of bytes; a uint8 tensor beside it holds JSON with the shape and the block size. Source:
bitsandbytes 0.50.2, `functional.QuantState.as_dict(packed=True)`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from qlora_hal.contract.values import LinearShape
from qlora_hal.files import strict_json
from qlora_hal.formats import nf4
from qlora_hal.formats.record import (
    CheckpointLayout,
    FormatRecord,
    Packing,
    StoredCheckpoint,
    UnreadableFormatError,
)
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.codebooks import FOUR_BIT_CODEBOOKS, FourBitFormat
from qlora_hal_oracle.codecs import FourBitCodec
from qlora_hal_oracle.double_quantization import NESTED_BLOCK_SIZE

BLOCK_SIZES = (64, 32, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".weight.quant_state.bitsandbytes__"
_STATES = tuple(f"{_STATE}{kind.value}" for kind in FourBitFormat)
_PARTS = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map"})
_FIELDS = frozenset({"quant_type", "blocksize", "shape", "dtype", "nested_blocksize", "nested_dtype", "nested_offset"})
_FLOATS = ("F32", "F16", "BF16")


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return any(_STATE in name for name in checkpoint.tensors)


def _read(checkpoint: StoredCheckpoint) -> Packing:
    shapes: dict[str, LinearShape] = {}
    states: dict[str, Mapping[str, object]] = {}
    kinds: dict[tuple[str, int, bool], str] = {}
    for name in checkpoint.tensors:
        module, found, quant_type = name.partition(_STATE)
        if found:
            state = _state(checkpoint, name)
            shapes[module] = _shape(checkpoint, module, state)
            block_size = checkpoint.whole(name, state.get("blocksize"))
            states[module] = state
            kinds.setdefault((quant_type, block_size, "nested_blocksize" in state), module)
    if len(kinds) > 1:
        raise checkpoint.contradiction(
            "its modules are quantized in different ways: "
            + "; ".join(
                f"{module}: {kind}, block {block}{', its scales quantized too' if is_nested else ''}"
                for (kind, block, is_nested), module in kinds.items()
            )
        )
    ((quant_type, block_size, double_quant),) = kinds
    if quant_type not in {kind.value for kind in FourBitFormat}:
        raise UnreadableFormatError(f"quantized with bitsandbytes {quant_type}")
    for module, described in states.items():
        _check_parts(checkpoint, module, FourBitFormat(quant_type), described)
    _refuse_strange_parts(checkpoint, states)
    return Packing(Prequantized("bitsandbytes", quant_type, block_size, double_quant, {"bits": 4}), shapes)


def _state(checkpoint: StoredCheckpoint, name: str) -> dict[str, object]:
    raw = checkpoint.read_bytes(name)
    try:
        state = strict_json.decode_foreign(raw)
        if not isinstance(state, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise checkpoint.contradiction(f"{name} is not the JSON of a quantization state ({error})") from error
    return state


def _sides(checkpoint: StoredCheckpoint, module: str, state: Mapping[str, object]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise checkpoint.contradiction(f"{module} has the quantization state of shape {shape!r}, not [out, in]")
    rows, columns = (checkpoint.whole(module, side) for side in shape)
    return rows, columns


def _shape(checkpoint: StoredCheckpoint, module: str, state: Mapping[str, object]) -> LinearShape:
    rows, columns = _sides(checkpoint, module, state)
    packed = checkpoint.tensors.get(f"{module}.weight")
    if packed is None or packed.byte_count != (rows * columns + 1) // 2:
        stored = "no" if packed is None else str(packed.byte_count)
        raise checkpoint.contradiction(
            f"{module}.weight has {stored} bytes, [{rows}, {columns}] in 4 bits needs another number"
        )
    return LinearShape(columns, rows)


def _check_parts(checkpoint: StoredCheckpoint, module: str, kind: FourBitFormat, state: Mapping[str, object]) -> None:
    """Everything beside the packed weight, as its decoder takes it without a look: too few scales are read beyond their
    end, and bitsandbytes decodes with its own table whatever `quant_map` holds. Raises ModelError QH-C73."""
    weight = f"{module}.weight"
    is_nested = "nested_blocksize" in state
    _check_state(checkpoint, weight, kind, state, is_nested=is_nested)
    blocks = math.ceil(math.prod(_sides(checkpoint, module, state)) / checkpoint.whole(weight, state["blocksize"]))
    expected = {"absmax": (("U8",) if is_nested else _FLOATS, blocks), "quant_map": (("F32",), 16)}
    if is_nested:
        nested_blocks = math.ceil(blocks / checkpoint.whole(weight, state["nested_blocksize"]))
        expected |= {"nested_absmax": (_FLOATS, nested_blocks), "nested_quant_map": (("F32",), 256)}
    for part, (dtypes, count) in expected.items():
        _check_part(checkpoint, f"{weight}.{part}", dtypes, count)
    if not np.array_equal(np.frombuffer(checkpoint.read_bytes(f"{weight}.quant_map"), "<f4"), FOUR_BIT_CODEBOOKS[kind]):
        raise checkpoint.contradiction(f"{weight}.quant_map is not the table of {kind.value}, which its decoders use")


def _refuse_strange_parts(checkpoint: StoredCheckpoint, modules: Collection[str]) -> None:
    for name in checkpoint.tensors:
        module, found, part = name.partition(".weight.")
        if found and module in modules and part not in _PARTS and f".weight.{part}" not in _STATES:
            raise checkpoint.contradiction(f"{name} is no part of a packed weight")


def _check_part(checkpoint: StoredCheckpoint, name: str, dtypes: Collection[str], count: int) -> None:
    entries, dtype = math.prod(checkpoint.shape(name)), checkpoint.tensors[name].dtype
    if entries != count or dtype not in dtypes:
        raise checkpoint.contradiction(
            f"{name} has {entries} entries in {dtype}; its shape and block size need {count} in {' or '.join(dtypes)}"
        )


def _check_state(
    checkpoint: StoredCheckpoint, weight: str, kind: FourBitFormat, state: Mapping[str, object], *, is_nested: bool
) -> None:
    offset = state.get("nested_offset")
    is_number = isinstance(offset, int | float) and not isinstance(offset, bool) and abs(offset) < 3e38
    wrong = {
        "quant_type": state.get("quant_type") != kind.value,
        "dtype": state.get("dtype") not in ("float32", "float16", "bfloat16"),
        "nested_dtype": is_nested and state.get("nested_dtype") != "float32",
        "nested_offset": is_nested and not is_number,
        **dict.fromkeys(state.keys() - _FIELDS, True),
    }
    if found := [field for field, is_wrong in wrong.items() if is_wrong]:
        raise checkpoint.contradiction(
            f"the quantization state of {weight} has {found[0][:80]} = {str(state.get(found[0]))[:80]}, which "
            f"bitsandbytes does not write for {kind.value}"
        )


def _bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
    """Half a byte a weight and an absmax a block: float32, or one byte and a float32 to 256 under double quantization
    (QLoRA section 3: 4.127 bits a weight at block 64)."""
    count = inputs * outputs
    blocks = math.ceil(count / block_size)
    scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) if double_quant else 4 * blocks
    return math.ceil(count / 2) + scales


LAYOUT = CheckpointLayout(
    "bitsandbytes",
    _recognizes,
    _read,
    marks=(
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        *_STATES,
    ),
    constant=(".weight.quant_map", ".weight.nested_quant_map", *_STATES),
    on_load=True,
)

NF4 = FormatRecord(
    name="nf4",
    title="16-entry normal-float codebook with an absmax per block (QLoRA)",
    level="4bit",
    bits=4,
    codec=FourBitCodec(FourBitFormat.NF4),
    packed_bytes=_bytes,
    layout=LAYOUT,
    block_sizes=BLOCK_SIZES,
    double_quant=True,
    writer=nf4.WRITER,
)

FP4 = FormatRecord(
    name="fp4",
    title="4-bit floats (sign, 2-bit exponent, 1-bit mantissa) with an absmax per block",
    level="4bit",
    bits=4,
    codec=FourBitCodec(FourBitFormat.FP4),
    packed_bytes=_bytes,
    layout=LAYOUT,
    block_sizes=BLOCK_SIZES,
    double_quant=True,
)
