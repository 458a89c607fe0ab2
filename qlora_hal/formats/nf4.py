"""NF4 in bitsandbytes' layout, written with NumPy: what transformers and every backend here load as pre-quantized.

Layout: bitsandbytes 0.50.2, `QuantState.as_dict(packed=True)`: two codes a byte, the first in the high nibble; one
float32 absmax for each block of the flattened weight; JSON as uint8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.formats.nf4_codes import NF4_TABLE, encode
from qlora_hal.formats.record import PackedWriter

BLOCK_SIZE = 64
_STATE = ".weight.quant_state.bitsandbytes__nf4"


def packed_shapes(module: str, shape: LinearShape, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (safetensors dtype, shape) of what a packed weight `[out, in]` is stored as."""
    count = shape.parameters
    return {
        f"{module}.weight": ("U8", (-(-count // 2), 1)),
        f"{module}.weight.absmax": ("F32", (-(-count // BLOCK_SIZE),)),
        f"{module}.weight.quant_map": ("F32", (len(NF4_TABLE),)),
        f"{module}{_STATE}": ("U8", (len(_state(shape.weight, dtype)),)),
    }


def packed(module: str, weight: Float32, dtype: str) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors of `packed_shapes`. `dtype` is what the weight is decoded to."""
    codes, absmax = encode(weight.reshape(-1), BLOCK_SIZE)
    return {
        f"{module}.weight": codes[:, None],
        f"{module}.weight.absmax": absmax,
        f"{module}.weight.quant_map": NF4_TABLE,
        f"{module}{_STATE}": np.frombuffer(_state(weight.shape, dtype), np.uint8),
    }


def description(dtype: str) -> dict[str, object]:
    """`quantization_config` of a folder whose linear layers, but the head, are stored so."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _state(shape: tuple[int, ...], dtype: str) -> bytes:
    state = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": dtype, "shape": list(shape)}
    text = json.dumps(state).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # what follows in the file stays aligned


WRITER = PackedWriter(packed_shapes, packed, description)
