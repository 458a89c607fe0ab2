"""NF4 weights on MLX: bitsandbytes' bytes in memory, decoded anew for each product, gradient to the input only.

MLX itself has no NF4. A weight stays packed (4.5 bits a parameter with blocks of 64, 4.13 doubly quantized) and is
decoded where a product needs it; nothing decoded is kept from the forward to the backward pass. The values are those
that bitsandbytes computes with on other hardware, so an adapter meets the same base everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
import numpy as np

from qlora_hal.errors import ModelError
from qlora_hal.formats.four_bit import BLOCK_SIZES
from qlora_hal.formats.nf4_codes import Float32, dynamic_table, encode, nest
from qlora_hal_backends.mlx_lora.nf4_metal import decode, kernel_path
from qlora_hal_oracle.double_quantization import NESTED_BLOCK_SIZE

__all__ = ["BLOCK_SIZES", "NF4Weight", "NestedAbsmax", "kernel_path", "quantize_nf4"]


@dataclass(frozen=True, slots=True, eq=False)
class NestedAbsmax:
    """Doubly quantized absmax values: uint8 `codes` `[blocks]` in a `table` `[256]`, times `absmax` `[blocks / 256]`,
    plus `offset` (a float32 array without dimensions)."""

    codes: mx.array
    table: mx.array
    absmax: mx.array
    offset: mx.array
    block_size: int = NESTED_BLOCK_SIZE

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.table.nbytes + self.absmax.nbytes + self.offset.nbytes

    def decode(self) -> mx.array:
        """Absmax of each block, float32 `[blocks]`, with bitsandbytes' two roundings."""
        scales = mx.repeat(self.absmax, self.block_size)[: self.codes.size]
        product = mx.take(self.table, self.codes) * scales
        # A compiler may join product and sum into one rounding; it cannot across a change of view.
        return product.view(mx.uint32).view(mx.float32) + self.offset


@dataclass(frozen=True, slots=True, eq=False)
class NF4Weight:
    """A frozen weight `[out, in]`.

    `packed` is uint8 `[ceil(out * in / 2)]`, two codes a byte of the weight flattened row by row. `absmax` is float32
    `[ceil(out * in / block_size)]`, or `NestedAbsmax`. Blocks run across rows where `in` is no multiple of the size.
    """

    packed: mx.array
    absmax: mx.array | NestedAbsmax
    shape: tuple[int, int]
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Every array that is kept, for `mx.eval` or as inputs of a compiled function."""
        if isinstance(self.absmax, NestedAbsmax):
            return self.packed, self.absmax.codes, self.absmax.table, self.absmax.absmax, self.absmax.offset
        return self.packed, self.absmax

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        """The values `[out, in]` that products see: table entry times absmax in float32, rounded once to `dtype`."""
        absmax = self.absmax.decode() if isinstance(self.absmax, NestedAbsmax) else self.absmax
        count = self.shape[0] * self.shape[1]
        return decode(self.packed, absmax, count, self.block_size, dtype).reshape(self.shape)

    def product(self, x: mx.array, *, dtype: mx.Dtype | None = None) -> mx.array:
        """x W^T: `[..., in]` to `[..., out]` in the dtype of `x`, differentiable in `x`.

        With `dtype` the weight is rounded to it first: a float32 product can see the weight of a bfloat16 model.
        """

        @mx.custom_function
        def through_weight(x: mx.array) -> mx.array:
            return x @ self._decoded_after(x, dtype).T

        @through_weight.vjp
        def gradient_of_input(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent @ self._decoded_after(cotangent, dtype)

        return cast("mx.array", through_weight(x))

    def _decoded_after(self, moment: mx.array, dtype: mx.Dtype | None) -> mx.array:
        """The values in the dtype of `moment`, decoded no earlier than `moment` is there.

        MLX may schedule or join work that depends on constants alone as it likes; with sixteen layers as with
        sixty-four, at most 10 decoded weights were alive at once on a CPU (its queue is ten deep), 14 without this.
        """
        packed = mx.depends([self.packed], [moment])[0]
        return replace(self, packed=packed).dequantize(dtype or moment.dtype).astype(moment.dtype)


def quantize_nf4(
    weight: mx.array, *, block_size: int = BLOCK_SIZES[0], double_quant: bool = False, name: str = "the weight"
) -> NF4Weight:
    """Pack a `[out, in]` weight of float32, bfloat16 or float16 as bitsandbytes would, bit for bit.

    Of doubly quantized scales the mean that is taken off first may differ in its last bits (see `nf4_codes.nest`).
    Raises ModelError QH-M52 naming `name` when a value is not finite, ValueError for a size or shape NF4 does not have.
    """
    if block_size not in BLOCK_SIZES or weight.ndim != 2:
        raise ValueError(
            f"block size {block_size} of {BLOCK_SIZES} and a [out, in] weight are needed, got {weight.shape}"
        )
    values: Float32 = np.array(weight.astype(mx.float32, stream=mx.cpu), copy=False).reshape(-1)
    packed, absmax = encode(values, block_size)
    if not np.isfinite(absmax).all():  # the largest magnitude of a block is NaN or infinite when any of its values is
        raise ModelError(
            "QH-M52",
            f"{name} holds NaN or infinity; finite numbers are expected.",
            where=name,
            cause="The checkpoint is damaged, or overflowed when it was converted to 16 bits.",
            fix="Fetch the checkpoint again, or convert it from float32 to bfloat16.",
        )
    scales = _nested(absmax) if double_quant else mx.array(absmax)
    out_features, in_features = weight.shape
    return NF4Weight(mx.array(packed), scales, (out_features, in_features), block_size)


def _nested(absmax: Float32) -> NestedAbsmax:
    nested = nest(absmax)
    return NestedAbsmax(
        mx.array(nested.codes), mx.array(dynamic_table()), mx.array(nested.absmax), mx.array(float(nested.offset))
    )
