"""What each weight format means: from a weight to the tensors that files hold of it, and back.

A codec writes what the library of its format writes, tensor for tensor, so that the small models of `random_models`
are checkpoints that this library reads. The numbers are those of the modules named after the formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .arrays import AnyFloat, Float32, Float64, Int32, UInt8
from .codebooks import FOUR_BIT_CODEBOOKS, FourBitFormat, dynamic_8bit
from .double_quantization import NESTED_BLOCK_SIZE, absmax_error_bound, dequantize_absmax, quantize_absmax
from .four_bit import FourBitLayout, dequantize_four_bit, four_bit_error_bound, quantize_four_bit
from .gptq import (
    GptqWeight,
    ZeroPointConvention,
    dequantize_gptq,
    min_max_grid,
    pack_gptq,
    round_to_grid,
)
from .int8 import dequantize_int8_rows, int8_error_bound, quantize_int8_rows
from .microscaling import (
    MicroscalingFormat,
    MicroscalingWeight,
    dequantize_microscaling,
    microscaling_error_bound,
    quantize_microscaling,
)
from .mlx_affine import MlxAffineWeight, dequantize_mlx_affine, mlx_affine_error_bound, quantize_mlx_affine

Array = npt.NDArray[Any]
StoredTensors = Mapping[str, Array]
"""The tensors of one module by what follows its path: `.weight`, `.weight.absmax`, `.scales`, ..."""


@runtime_checkable
class Codec(Protocol):
    """The meaning of one weight format. A weight is `[out, in]`; `block_size` is None where a format has no blocks."""

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        """What a file holds of the weight. A format that is calibrated rounds to its grid here."""
        ...

    def dequantize(self, stored: StoredTensors) -> Float64:
        """The weight that is stored, exactly."""
        ...

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64 | None:
        """A bound `[out, in]` for |weight - what it is decoded to|; None where a solver chooses the codes."""
        ...

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        """What config.json says of a model that is stored so."""
        ...


@dataclass(frozen=True, slots=True)
class UnquantizedCodec:
    """No quantization: the weight itself."""

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        return {".weight": np.asarray(weight, dtype=np.float32)}

    def dequantize(self, stored: StoredTensors) -> Float64:
        return stored[".weight"].astype(np.float64)

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        return np.zeros(weight.shape)

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        return {}


@dataclass(frozen=True, slots=True)
class FourBitCodec:
    """NF4 and FP4 as bitsandbytes writes them (0.50.2, `functional.QuantState.as_dict(packed=True)`)."""

    kind: FourBitFormat

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        size = _given(block_size)
        packed = quantize_four_bit(weight, weight_format=self.kind, block_size=size)
        state: dict[str, object] = {"quant_type": self.kind.value, "blocksize": size, "dtype": "float32"}
        state["shape"] = list(weight.shape)
        stored: dict[str, Array] = {
            ".weight": packed.packed.reshape(-1, 1),
            ".weight.quant_map": FOUR_BIT_CODEBOOKS[self.kind],
        }
        if double_quant:
            nested = quantize_absmax(packed.absmax)
            state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
            state["nested_offset"] = float(nested.offset)
            stored[".weight.nested_absmax"] = nested.nested_absmax
            stored[".weight.nested_quant_map"] = dynamic_8bit()
        stored[".weight.absmax"] = nested.codes if double_quant else packed.absmax
        stored[self._state_name] = np.frombuffer(json.dumps(state).encode("utf-8"), dtype=np.uint8)
        return stored

    def dequantize(self, stored: StoredTensors) -> Float64:
        state = json.loads(stored[self._state_name].tobytes())
        layout = FourBitLayout(self.kind, state["blocksize"], tuple(state["shape"]))
        absmax: Float32 | Float64 = stored[".weight.absmax"]
        if ".weight.nested_absmax" in stored:
            absmax = dequantize_absmax(
                stored[".weight.absmax"],
                stored[".weight.nested_absmax"],
                state["nested_offset"],
                codebook=stored[".weight.nested_quant_map"],
            )
        return dequantize_four_bit(stored[".weight"], absmax, layout)

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        packed = quantize_four_bit(weight, weight_format=self.kind, block_size=_given(block_size))
        nested = _nested_error(packed.absmax) if double_quant else 0.0
        return four_bit_error_bound(packed.absmax, packed.layout, absmax_error=nested)

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        described = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind.value,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": "float32",
        }
        return {"quantization_config": described}

    @property
    def _state_name(self) -> str:
        return f".weight.quant_state.bitsandbytes__{self.kind.value}"


def _nested_error(absmax: Float32) -> Float64:
    nested = quantize_absmax(absmax)
    return absmax_error_bound(nested.nested_absmax, nested.offset, absmax.size)


@dataclass(frozen=True, slots=True)
class Int8Codec:
    """LLM.int8's integers with a scale to a row, as bitsandbytes writes them."""

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        codes, row_absmax = quantize_int8_rows(weight)
        return {".weight": codes, ".SCB": row_absmax}

    def dequantize(self, stored: StoredTensors) -> Float64:
        return dequantize_int8_rows(stored[".weight"].view(np.int8), stored[".SCB"])

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        """Of the larger step: bitsandbytes takes absmax of the weight in float16, which may have been rounded up;
        others take that of the weight itself."""
        _, row_absmax = quantize_int8_rows(weight)
        return int8_error_bound(weight, np.maximum(row_absmax, np.abs(weight).max(axis=1)))

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        return {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


@dataclass(frozen=True, slots=True)
class GptqCodec:
    """GPTQ's layout around plain rounding to a min-max grid. `act_order` scatters the inputs of a group over the layer.
    Without `block_size` all inputs are one group."""

    symmetric: bool = True
    act_order: bool = False
    convention: ZeroPointConvention = ZeroPointConvention.V1
    bits: int = 4

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        """Four bits have no NaN: a value that is not finite becomes the scale of its group."""
        groups = self._groups(weight.shape[1], block_size)
        finite = np.where(np.isfinite(weight), weight, np.float32(0.0))
        grid = min_max_grid(finite, groups, bits=self.bits, symmetric=self.symmetric)
        codes = round_to_grid(finite, grid, groups, bits=self.bits)
        for row, column in np.argwhere(~np.isfinite(weight)):
            grid.steps[groups[column], row] = weight[row, column]
        packed = pack_gptq(codes, grid, groups, bits=self.bits, convention=self.convention)
        return {
            ".qweight": packed.qweight,
            ".qzeros": packed.qzeros,
            ".scales": packed.scales,
            ".g_idx": packed.g_idx,
        }

    def dequantize(self, stored: StoredTensors) -> Float64:
        qweight, qzeros, scales, g_idx = (stored[name] for name in (".qweight", ".qzeros", ".scales", ".g_idx"))
        return dequantize_gptq(GptqWeight(qweight, qzeros, scales, g_idx, self.bits, self.convention))

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> None:
        return None

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        described: dict[str, object] = {"quant_method": "gptq", "bits": self.bits, "group_size": block_size or -1}
        described |= {"sym": self.symmetric, "desc_act": self.act_order}
        described["checkpoint_format"] = self.convention.value
        return {"quantization_config": described}

    def _groups(self, inputs: int, block_size: int | None) -> Int32:
        groups = (np.arange(inputs) // (block_size or inputs)).astype(np.int32)
        return np.random.default_rng(inputs).permutation(groups) if self.act_order else groups


@dataclass(frozen=True, slots=True)
class MlxAffineCodec:
    """MLX's integers with a scale and a bias to a group."""

    bits: int

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        packed = self._packed(weight, block_size)
        return {".weight": packed.packed, ".scales": packed.scales, ".biases": packed.biases}

    def dequantize(self, stored: StoredTensors) -> Float64:
        packed, scales, biases = (stored[name] for name in (".weight", ".scales", ".biases"))
        group_size = packed.shape[1] * 32 // self.bits // scales.shape[1]
        return dequantize_mlx_affine(MlxAffineWeight(packed, scales, biases, self.bits, group_size))

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        return mlx_affine_error_bound(self._packed(weight, block_size))

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        return {"quantization": {"group_size": block_size, "bits": self.bits, "mode": "affine"}}

    def _packed(self, weight: AnyFloat, block_size: int | None) -> MlxAffineWeight:
        return quantize_mlx_affine(weight, bits=self.bits, group_size=_given(block_size))


@dataclass(frozen=True, slots=True)
class MicroscalingCodec:
    """Small floats with a scale to a group, as MLX writes them. Each kind has one group size of its own."""

    kind: MicroscalingFormat

    def quantize(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> StoredTensors:
        packed = quantize_microscaling(weight, self.kind)
        return {".weight": packed.packed, ".scales": packed.scale_codes}

    def dequantize(self, stored: StoredTensors) -> Float64:
        codes: UInt8 = stored[".scales"]
        return dequantize_microscaling(MicroscalingWeight(stored[".weight"], codes, self.kind))

    def error_bound(self, weight: AnyFloat, block_size: int | None, double_quant: bool = False) -> Float64:
        return microscaling_error_bound(quantize_microscaling(weight, self.kind), weight)

    def description(self, block_size: int | None, double_quant: bool = False) -> Mapping[str, object]:
        described = {"group_size": self.kind.group_size, "bits": self.kind.bits, "mode": self.kind.value}
        return {"quantization": described}


def _given(block_size: int | None) -> int:
    if block_size is None:
        raise ValueError("this format has blocks, and no block size is given")
    return block_size
