"""The frozen weights of one linear layer, packed; `dense()` gives them as the products see them.

Only the functional codec of bitsandbytes is used, never its `Linear4bit`: in eval mode that module repacks its weight
in place on AVX512-BF16 CPUs and later passes wrong gradients (measured with 0.50.2; upstream issue 2078).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from bitsandbytes import functional as codec
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family import microscaling

INT8_LEVELS = 127.0


class BaseWeight(Protocol):
    """A frozen weight of shape `[out, in]`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def dense(self) -> Tensor:
        """The weight `[out, in]` in the compute dtype. The caller must not write to it."""
        ...


@dataclass(slots=True)
class DenseWeight:
    """Not quantized."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        return self.weight


@dataclass(slots=True)
class Blockwise4BitWeight:
    """NF4 or FP4 in bitsandbytes' layout: two codes a byte, one absmax a block, absmax quantized again if nested."""

    packed: Tensor
    state: codec.QuantState
    _host_offset: float | None = None

    @property
    def host_offset(self) -> float:
        """The offset of a nested absmax, brought to the host once: a kernel takes it as a number at each launch."""
        if self._host_offset is None:
            self._host_offset = float(self.state.offset)
        return self._host_offset

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape[0], self.state.shape[1]

    def dense(self) -> Tensor:
        if self.packed.device.type == "cpu" and self.state.shape[-1] % self.state.blocksize:
            return _decoded_by_lookup(self.packed, self.state)
        weight: Tensor = codec.dequantize_4bit(self.packed, self.state)
        return weight


def _decoded_by_lookup(packed: Tensor, state: codec.QuantState) -> Tensor:
    """The definition, in plain torch. bitsandbytes 0.50.2 decodes wrongly on AVX-512 CPUs, without a word, where a row
    does not hold a whole number of blocks: its kernel starts a new block with each row."""
    absmax = state.absmax
    if state.nested:
        absmax = codec.dequantize_blockwise(absmax, state.state2) + state.offset
    count = state.shape.numel()
    pairs = packed.view(torch.uint8).reshape(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).reshape(-1)[:count]  # the high nibble comes first
    scales = absmax.float().repeat_interleave(state.blocksize)[:count]
    weight: Tensor = (state.code[codes.int()] * scales).reshape(state.shape).to(state.dtype)
    return weight


def exact(base: BaseWeight) -> Tensor:
    """The weight `[out, in]` in float32, without the rounding of `dense` to the compute dtype where it is decoded."""
    if not isinstance(base, Blockwise4BitWeight):
        return base.dense().float()
    state = copy(base.state)
    state.dtype = torch.float32
    return Blockwise4BitWeight(base.packed, state).dense()


@dataclass(slots=True)
class Int8Weight:
    """Integers with one absmax per output row: the storage of LLM.int8 (Dettmers et al. 2022).

    The product is computed on dequantized weights. LLM.int8's rounding of the *activations* is left out: it would make
    the same layer compute something else on each device.
    """

    integers: Tensor
    row_absmax: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[0], self.integers.shape[1]

    def dense(self) -> Tensor:
        return (self.integers.to(torch.float32) * (self.row_absmax / INT8_LEVELS)[:, None]).to(self.dtype)


def quantize(weight: Tensor, quantization: Quantization, dtype: torch.dtype) -> BaseWeight:
    """Pack a `[out, in]` weight; the products will see it in `dtype`."""
    match quantization.weight_format:
        case WeightFormat.NONE:
            return DenseWeight(weight.to(dtype))
        case WeightFormat.INT8:
            exact = weight.to(torch.float32)
            row_absmax = exact.abs().amax(dim=1)
            # A row of zeros stays zero whatever its scale; the floor keeps 0/0 out.
            integers = (exact * (INT8_LEVELS / row_absmax.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round()
            return Int8Weight(integers.to(torch.int8), row_absmax, dtype)
        case WeightFormat.NF4 | WeightFormat.FP4:
            assert quantization.block_size is not None, "the core resolves the block size before a backend loads"
            packed, state = codec.quantize_4bit(
                weight.to(dtype).contiguous(),
                blocksize=quantization.block_size,
                compress_statistics=quantization.double_quant,
                quant_type=quantization.weight_format.value,
            )
            return Blockwise4BitWeight(packed, state)
        case WeightFormat.MXFP4:
            return microscaling.encoded(weight.to(dtype), dtype)
        case other:
            raise AssertionError(f"{other} is not in this family's capabilities")
