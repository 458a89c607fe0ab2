"""One linear layer's tensors in a checkpoint, as the packed weight they become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from qlora_hal.contract.backend import Quantization
from qlora_hal.errors import ModelError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.base_weights import BaseWeight, CodebookWeight, DenseWeight, GroupedWeight, quantize
from qlora_hal_backends.mlx_lora.capabilities import MLX_FORMATS
from qlora_hal_backends.mlx_lora.nf4_bitsandbytes import read_weight

if TYPE_CHECKING:
    from qlora_hal_backends.mlx_lora.stored_tensors import Weights


def read_base_weight(
    weights: Weights, path: str, source: ModelSource, quantization: Quantization, dtype: Any
) -> BaseWeight:
    """Quantize an ordinary weight, or take a packed one as it is."""
    stored = source.facts.prequantized
    if stored is None:
        return _quantized(weights.take(f"{path}.weight"), path, source.name, quantization, dtype)
    if stored.method == "mlx":
        return _packed_by_mlx(weights, path, quantization, dtype)
    return _packed_by_bitsandbytes(weights, path, dtype)


def _packed_by_bitsandbytes(weights: Weights, path: str, dtype: Any) -> BaseWeight:
    """Only NF4 comes here: of bitsandbytes' formats no other is declared."""
    parts = [name for name in weights.arrays if name.startswith(f"{path}.weight.")]
    if not parts:
        return DenseWeight(weights.take(f"{path}.weight").astype(dtype))
    tensors = {name: weights.take(name) for name in (f"{path}.weight", *parts)}
    return CodebookWeight(read_weight(tensors, path), dtype)


def _quantized(weight: mx.array, path: str, where: str, quantization: Quantization, dtype: Any) -> BaseWeight:
    record_of(quantization.weight_format).require_whole_blocks(path, weight.shape[-1], quantization.block_size, where)
    # Before it is packed: some codecs make an ordinary number of what is none.
    require_finite(path, (weight,), where)
    return quantize(weight, quantization, dtype)


def _packed_by_mlx(weights: Weights, path: str, quantization: Quantization, dtype: Any) -> BaseWeight:
    packed = weights.take(f"{path}.weight")
    if not weights.has(f"{path}.scales"):
        return DenseWeight(packed.astype(dtype))
    scales = weights.take(f"{path}.scales")
    biases = weights.take(f"{path}.biases") if weights.has(f"{path}.biases") else None
    known = MLX_FORMATS[quantization.weight_format]
    assert quantization.block_size is not None
    return GroupedWeight(packed, scales, biases, quantization.block_size, known.bits, known.mode)


def require_finite(name: str, arrays: Iterable[mx.array], where: str) -> None:
    """Raises ModelError QH-M52 for the first tensor that holds a NaN or an infinity."""
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating) and not bool(mx.isfinite(array).all()):
            raise ModelError(
                "QH-M52",
                f"{name} holds a weight that is not finite.",
                where=where,
                cause="A NaN or an infinity spoils every number that is computed with it.",
                fix="Get the checkpoint again from its source.",
            )
