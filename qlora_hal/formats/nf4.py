"""NF4 in bitsandbytes' layout, written with NumPy: what transformers and every backend here load as pre-quantized.

Codebook: QLoRA (Dettmers et al. 2023, appendix E). Layout: bitsandbytes 0.50.2, `QuantState.as_dict(packed=True)`: two
codes a byte, the first in the high nibble; one float32 absmax for each block of the flattened weight; JSON as uint8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Float32, LinearShape

BLOCK_SIZE = 64
CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_BOUNDS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2
_STATE = ".weight.quant_state.bitsandbytes__nf4"
_BLOCKS_AT_A_TIME = 2**16


def packed_shapes(module: str, shape: LinearShape, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (safetensors dtype, shape) of what a packed weight `[out, in]` is stored as."""
    count = shape.parameters
    return {
        f"{module}.weight": ("U8", (-(-count // 2), 1)),
        f"{module}.weight.absmax": ("F32", (-(-count // BLOCK_SIZE),)),
        f"{module}.weight.quant_map": ("F32", (len(CODEBOOK),)),
        f"{module}{_STATE}": ("U8", (len(_state(shape.weight, dtype)),)),
    }


def packed(module: str, weight: Float32, dtype: str) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors of `packed_shapes`. `dtype` is what the weight is decoded to."""
    flat = weight.reshape(-1)
    blocks = -(-flat.size // BLOCK_SIZE)
    absmax = np.empty(blocks, np.float32)
    codes = np.empty(blocks * BLOCK_SIZE, np.uint8)
    for start in range(0, blocks, _BLOCKS_AT_A_TIME):
        part = flat[start * BLOCK_SIZE : (start + _BLOCKS_AT_A_TIME) * BLOCK_SIZE]
        grid = np.zeros((-(-part.size // BLOCK_SIZE), BLOCK_SIZE), np.float32)
        grid.reshape(-1)[: part.size] = part
        largest = np.abs(grid).max(axis=1)
        absmax[start : start + len(grid)] = largest
        # A block of zeros stays zero whatever its scale.
        scaled = grid * (1 / np.maximum(largest, np.finfo(np.float32).tiny))[:, None]
        codes[start * BLOCK_SIZE : start * BLOCK_SIZE + grid.size] = np.searchsorted(_BOUNDS, scaled.reshape(-1))
    even = codes[: flat.size + flat.size % 2]
    return {
        f"{module}.weight": (even[0::2] << 4 | even[1::2])[:, None],
        f"{module}.weight.absmax": absmax,
        f"{module}.weight.quant_map": CODEBOOK,
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


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `packed_shapes`."""
    return math.prod(shape) * {"U8": 1, "F32": 4}[dtype]


def _state(shape: tuple[int, ...], dtype: str) -> bytes:
    state = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": dtype, "shape": list(shape)}
    text = json.dumps(state).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # what follows in the file stays aligned
