"""How packed NF4 codes become numbers on each device: a Metal kernel on Apple GPUs, a table look-up elsewhere.

Both do the same three things for each value: take its code from the byte, look the code up, multiply by the block's
absmax in float32, round to the dtype asked for. One product and one rounding leave no freedom, so both give the same
bits, except that a GPU which flushes subnormal numbers gives 0 where |value| < 2**-126.

The kernel has not been run on Apple hardware yet; its text is generated from the table that the other path uses, and
the tests run that text, translated to C++, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np

from qlora_hal.formats.nf4_codes import NF4_TABLE, byte_pairs

METAL_LOOKUP = "metal_lookup"
TABLE_LOOKUP = "table_lookup"
BYTES_PER_THREAD = 4

_BODY = """
    const uint first_byte = thread_position_in_grid.x * BYTES_PER_THREAD;
    const float scale = absmax[first_byte * 2 / BLOCK_SIZE];
    for (uint i = 0; i < BYTES_PER_THREAD; ++i) {
        const uint place = (first_byte + i) * 2;
        if (place >= COUNT) {
            return;
        }
        const uint two = codes[first_byte + i];
        values[place] = static_cast<T>(as_type<float>(NF4_BITS[two >> 4]) * scale);
        if (place + 1 < COUNT) {
            values[place + 1] = static_cast<T>(as_type<float>(NF4_BITS[two & 15]) * scale);
        }
    }
"""


def kernel_path() -> str:
    """Which of the two decodes on the default device: `metal_lookup` or `table_lookup`."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return METAL_LOOKUP if on_gpu and mx.metal.is_available() else TABLE_LOOKUP


def decode(packed: mx.array, absmax: mx.array, count: int, block_size: int, dtype: mx.Dtype) -> mx.array:
    """The first `count` values `[count]` of packed codes: uint8 `[ceil(count / 2)]`, absmax float32 `[blocks]`."""
    path = decode_in_metal if kernel_path() == METAL_LOOKUP else decode_by_table
    return path(packed, absmax, count, block_size, dtype)


def decode_by_table(packed: mx.array, absmax: mx.array, count: int, block_size: int, dtype: mx.Dtype) -> mx.array:
    """Through a table of the two values of each byte."""
    values = mx.take(mx.array(byte_pairs()), packed, axis=0).reshape(-1)
    if count % block_size == 0:
        scaled = values.reshape(-1, block_size) * absmax[:, None]
        return scaled.reshape(-1).astype(dtype)
    scales = mx.repeat(absmax, block_size)[:count]
    return (values[:count] * scales).astype(dtype)


def decode_in_metal(packed: mx.array, absmax: mx.array, count: int, block_size: int, dtype: mx.Dtype) -> mx.array:
    """Through the kernel: a thread reads four bytes, which always lie in one block, and writes up to eight values."""
    threads = -(-packed.size // BYTES_PER_THREAD)
    template = [("T", dtype), ("COUNT", count), ("BLOCK_SIZE", block_size), ("BYTES_PER_THREAD", BYTES_PER_THREAD)]
    (values,) = _kernel()(
        inputs=[packed, absmax],
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(min(256, threads), 1, 1),
        output_shapes=[(count,)],
        output_dtypes=[dtype],
    )
    return values


def kernel_body() -> str:
    """The kernel's statements, with `codes`, `absmax` and `values` as MLX declares them."""
    return _BODY


def kernel_header() -> str:
    """The table as the bits of its float32 values: text in decimals could be rounded by a compiler."""
    bits = ", ".join(f"0x{word:08x}" for word in NF4_TABLE.view(np.uint32).tolist())
    return f"constant uint NF4_BITS[16] = {{{bits}}};\n"


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    kernel = mx.fast.metal_kernel(
        name="qlora_hal_nf4_decode",
        input_names=["codes", "absmax"],
        output_names=["values"],
        header=kernel_header(),
        source=kernel_body(),
    )
    return cast("Callable[..., list[mx.array]]", kernel)
