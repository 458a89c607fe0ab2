"""What bitsandbytes itself makes of a weight, as numpy arrays and bits."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional
    import torch
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

library: Any = bitsandbytes.functional
Array = npt.NDArray[Any]

DTYPES: dict[str, tuple[Any, mx.Dtype]] = {
    "float32": (torch.float32, mx.float32),
    "bfloat16": (torch.bfloat16, mx.bfloat16),
    "float16": (torch.float16, mx.float16),
}


def gaussian(rows: int, columns: int, dtype: str = "float32", seed: int = 0) -> Any:
    """A weight with a row of zeros and one outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=generator) * 0.05
    weight[1] = 0.0
    weight[2, 3] = 4.0
    return weight.to(DTYPES[dtype][0])


def quantized(weight: Any, block_size: int, *, nested: bool = False) -> tuple[Any, Any]:
    """(packed bytes, QuantState)."""
    packed, state = library.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested)
    return packed, state


def saved(weight: Any, block_size: int, *, nested: bool = False, prefix: str = "layer") -> dict[str, Array]:
    """The tensors that a checkpoint of bitsandbytes holds for one weight."""
    packed, state = quantized(weight, block_size, nested=nested)
    parts = {f"{prefix}.weight.{part}": tensor.numpy() for part, tensor in state.as_dict(packed=True).items()}
    return {f"{prefix}.weight": packed.numpy(), **parts}


def decoded(packed: Any, state: Any) -> Any:
    """bitsandbytes' own values. Where a row holds no whole number of blocks its AVX-512 decoder is wrong without a
    word (it starts a new block with each row), and its generic one is asked instead."""
    if state.shape[1] % state.blocksize == 0:
        return library.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = library.dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


def as_mlx(tensor: Any) -> mx.array:
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def bits(values: Any) -> Array:
    """The bits of a torch or MLX array, so that NaN, -0 and last places count."""
    array = values if isinstance(values, mx.array) else as_mlx(values)
    return np.array(array.view(mx.uint16 if array.itemsize == 2 else mx.uint32))
