"""NF4 weights as bitsandbytes saves them in a checkpoint (0.50.2, `functional.QuantState.as_dict(packed=True)`).

Beside `weight` (the packed bytes, in any storage dtype) lie `absmax`, `quant_map`, for double quantization
`nested_absmax` and `nested_quant_map`, and `quant_state.bitsandbytes__nf4`: JSON text as a tensor of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qlora_hal.errors import ModelError
from qlora_hal.formats.four_bit import BLOCK_SIZES
from qlora_hal.formats.nf4_codes import NF4_TABLE, Float32, UInt8
from qlora_hal_backends.mlx_lora.nf4 import NestedAbsmax, NF4Weight

Tensors: TypeAlias = "Mapping[str, npt.NDArray[np.generic] | mx.array]"

STATE = "quant_state.bitsandbytes__nf4"


def read_weight(tensors: Tensors, prefix: str) -> NF4Weight:
    """The weight of module `prefix` in a checkpoint that bitsandbytes saved, doubly quantized or not.

    Raises ModelError: QH-C73 when the tensors contradict each other, QH-M52 for scales that are not finite.
    """
    saved = _Saved(tensors, f"{prefix}.weight")
    state = saved.state()
    out_features, in_features = saved.sizes(state, "shape", 2)
    (block_size,) = saved.sizes(state, "blocksize", 1)
    count = out_features * in_features
    if block_size not in BLOCK_SIZES:
        raise saved.contradiction(f"it has blocks of {block_size}, bitsandbytes has {BLOCK_SIZES}")
    if not np.array_equal(saved.floats("quant_map", 16), NF4_TABLE):
        raise saved.contradiction("its quant_map is not the table of NF4, which bitsandbytes decodes with")
    packed = saved.bytes("", -(-count // 2))
    blocks = -(-count // block_size)
    if "nested_blocksize" not in state:
        return NF4Weight(
            mx.array(packed), mx.array(saved.floats("absmax", blocks)), (out_features, in_features), block_size
        )
    (nested_size,) = saved.sizes(state, "nested_blocksize", 1)
    nested = NestedAbsmax(
        mx.array(saved.bytes("absmax", blocks)),
        mx.array(saved.floats("nested_quant_map", 256)),
        mx.array(saved.floats("nested_absmax", -(-blocks // nested_size))),
        mx.array(saved.number(state, "nested_offset")),
        nested_size,
    )
    return NF4Weight(mx.array(packed), nested, (out_features, in_features), block_size)


class _Saved:
    """The tensors of one weight, each checked when it is taken."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors = tensors
        self._name = name

    def state(self) -> Mapping[str, object]:
        try:
            state = json.loads(self._raw(STATE).view(np.uint8).tobytes())
        except (ValueError, RecursionError) as problem:
            raise self.contradiction(f"{STATE} is not the JSON of a quantization state ({problem})") from problem
        if not isinstance(state, dict) or state.get("quant_type") != "nf4":
            raise self.contradiction(f"{STATE} does not describe NF4")
        return state

    def bytes(self, part: str, count: int) -> UInt8:
        found = self._raw(part).reshape(-1).view(np.uint8)
        self._require_count(part, found.size, count)
        return found

    def floats(self, part: str, count: int) -> Float32:
        found = self._raw(part).reshape(-1).astype(np.float32)
        self._require_count(part, found.size, count)
        if not np.isfinite(found).all():
            raise ModelError(
                "QH-M52",
                f"{self._key(part)} holds NaN or infinity; finite numbers are expected.",
                where=self._key(part),
                cause="The checkpoint is damaged, or overflowed when it was converted to 16 bits.",
                fix="Fetch the checkpoint again, or convert it from float32 to bfloat16.",
            )
        return found

    def sizes(self, state: Mapping[str, object], field: str, count: int) -> tuple[int, ...]:
        value = state.get(field)
        sizes = value if isinstance(value, list) else [value]
        if len(sizes) != count or not all(type(size) is int and size > 0 for size in sizes):
            raise self.contradiction(f"its {field} is {value!r}, {count} positive whole numbers are expected")
        return tuple(sizes)

    def number(self, state: Mapping[str, object], field: str) -> float:
        value = state.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3e38:
            raise self.contradiction(f"its {field} is {value!r}, a finite number is expected")
        return float(np.float32(value))

    def contradiction(self, problem: str) -> ModelError:
        return ModelError(
            "QH-C73",
            f"The checkpoint contradicts its own description: {self._name}: {problem}.",
            where=self._name,
            fix="Get the model again from its source, all files from one revision.",
        )

    def _key(self, part: str) -> str:
        return f"{self._name}.{part}" if part else self._name

    def _raw(self, part: str) -> npt.NDArray[np.generic]:
        found = self._tensors.get(self._key(part))
        if found is None:
            raise self.contradiction(f"{self._key(part)} is missing")
        if not isinstance(found, mx.array):
            return np.ascontiguousarray(found)
        # numpy has no bfloat16: absmax may have it, and so may packed bytes that were stored in another dtype.
        is_scale = part.endswith("absmax") and found.dtype != mx.uint8
        plain = found.astype(mx.float32) if is_scale else found.view(mx.uint8) if found.dtype == mx.bfloat16 else found
        return np.array(plain)

    def _require_count(self, part: str, found: int, expected: int) -> None:
        if found != expected:
            raise self.contradiction(f"{self._key(part)} has {found} entries, its shape and block size need {expected}")
