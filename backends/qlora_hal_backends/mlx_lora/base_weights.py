"""The frozen weights of one linear layer, packed; `product` multiplies with them, `dense` shows them.

Products are made and given in float32: what is added to them is added before anything is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import mlx.core as mx

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.mlx_lora.capabilities import MLX_FORMATS
from qlora_hal_backends.mlx_lora.nf4 import NF4Weight, quantize_nf4


class BaseWeight(Protocol):
    """A frozen weight of shape `[out, in]`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated and counted."""
        ...

    def product(self, rows: mx.array) -> mx.array:
        """`rows @ W^T` as float32, for float32 rows `[rows, in]`; differentiable in the rows."""
        ...

    def dense(self) -> mx.array:
        """The weight `[out, in]` as float32, exactly as the products see it."""
        ...


@dataclass(slots=True)
class DenseWeight:
    """Not quantized: stored in the compute dtype."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.weight,)

    def product(self, rows: mx.array) -> mx.array:
        return _dense_product(rows, self.dense())

    def dense(self) -> mx.array:
        return self.weight.astype(mx.float32)


@dataclass(slots=True)
class CodebookWeight:
    """NF4, packed as bitsandbytes packs it; decoded in `dtype`."""

    weight: NF4Weight
    dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.weight.arrays

    def product(self, rows: mx.array) -> mx.array:
        return self.weight.product(rows, dtype=self.dtype)

    def dense(self) -> mx.array:
        return self.weight.dequantize(self.dtype).astype(mx.float32)


@dataclass(slots=True)
class GroupedWeight:
    """MLX's packed formats: uint32 words, and a scale (affine: and a bias) to a group of a row."""

    packed: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 32 // self.bits

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.packed, self.scales) if self.biases is None else (self.packed, self.scales, self.biases)

    def product(self, rows: mx.array) -> mx.array:
        if mx.default_device() == mx.gpu:
            return self._packed_product(rows, transpose=True)
        return self._unpacked_product(rows)

    def dense(self) -> mx.array:
        scales, biases = self._wide_scales()
        dense: mx.array = mx.dequantize(
            self.packed,
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )
        return dense

    def _packed_product(self, rows: mx.array, *, transpose: bool) -> mx.array:
        scales, biases = self._wide_scales()
        product: mx.array = mx.quantized_matmul(
            rows,
            self.packed,
            scales,
            biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return product

    def _unpacked_product(self, rows: mx.array) -> mx.array:
        """On a CPU, mlx 0.32 multiplies with a transposed packed weight one number at a time: unpacked first it is
        half the time (512x256x704: 61 ms packed, 31 ms unpacked). Its product with the packed weight itself, which
        the gradient is, is the faster way (18 ms, 30 ms unpacked)."""

        @mx.custom_function
        def product(rows: mx.array) -> mx.array:
            return rows @ mx.contiguous(self._after(rows).dense().T)

        @product.vjp
        def gradient(rows: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return self._packed_product(cotangent, transpose=False)

        result: mx.array = cast("mx.array", product(rows))
        return result

    def _after(self, rows: mx.array) -> GroupedWeight:
        """The same weight, not to be unpacked before `rows` are there: what depends on constants alone MLX may compute
        at any time, for all layers at once."""
        return replace(self, packed=mx.depends([self.packed], [rows])[0])

    def _wide_scales(self) -> tuple[mx.array, mx.array | None]:
        """Scales of the affine mode as float32, so that codes are decoded in it; the others' are codes themselves."""
        if self.biases is None:
            return self.scales, None
        return self.scales.astype(mx.float32), self.biases.astype(mx.float32)


def _dense_product(rows: mx.array, weight: mx.array) -> mx.array:
    if mx.default_device() == mx.gpu:
        return rows @ weight.T
    # The reference BLAS of MLX's Linux wheel takes twice the time for a transposed right-hand side.
    return rows @ mx.contiguous(weight.T)


def quantize(weight: mx.array, quantization: Quantization, dtype: Any) -> BaseWeight:
    """Pack a `[out, in]` weight. Scales of the affine formats are stored in `dtype`."""
    weight_format = quantization.weight_format
    if weight_format is WeightFormat.NONE:
        return DenseWeight(weight.astype(dtype))
    group_size = quantization.block_size
    assert group_size is not None, "the core resolves the group size before a backend loads"
    if weight_format is WeightFormat.NF4:
        codes = quantize_nf4(weight.astype(dtype), block_size=group_size, double_quant=quantization.double_quant)
        return CodebookWeight(codes, dtype)
    known = MLX_FORMATS[weight_format]
    packed, scales, *biases = mx.quantize(
        weight.astype(dtype), group_size=group_size, bits=known.bits, mode=known.mode, stream=_quantizing_device()
    )
    return GroupedWeight(packed, scales, biases[0] if biases else None, group_size, known.bits, known.mode)


def _quantizing_device() -> Any:
    """MLX's CUDA kernel finds other scales than its CPU and Metal kernels do: half a step of some codes on an H200."""
    return mx.cpu if mx.cuda.is_available() else mx.default_device()
