"""Small Llamas with grouped-query attention, drawn from a generator and written with NumPy alone.

A model is a folder as a hub would hold it: `config.json` and `model.safetensors`, plain or already quantized in the
layout of bitsandbytes, GPTQ or MLX.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import LinearShape

from .arrays import Float32, Float64, Int32
from .codebooks import FP4, NF4, FourBitFormat, dynamic_8bit
from .double_quantization import dequantize_absmax, quantize_absmax
from .four_bit import FourBitLayout, dequantize_four_bit, quantize_four_bit
from .gptq import ZeroPointConvention, dequantize_gptq, min_max_grid, pack_gptq, round_to_grid
from .int8 import dequantize_int8_rows, quantize_int8_rows
from .microscaling import MicroscalingFormat, dequantize_microscaling, quantize_microscaling
from .mlx_affine import dequantize_mlx_affine, quantize_mlx_affine
from .roundoff import round_to_bfloat16
from .shape import LlamaShape

Array = npt.NDArray[Any]
Tensors = dict[str, Float32]

AFFINE_BITS: Mapping[WeightFormat, int] = {
    WeightFormat.INT2_AFFINE: 2,
    WeightFormat.INT3_AFFINE: 3,
    WeightFormat.INT4_AFFINE: 4,
    WeightFormat.INT5_AFFINE: 5,
    WeightFormat.INT6_AFFINE: 6,
    WeightFormat.INT8_AFFINE: 8,
}
MICROSCALING_FORMATS = (WeightFormat.MXFP4, WeightFormat.NVFP4, WeightFormat.MXFP8)
FIRST_ORDINARY_TOKEN = 3
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _shape(
    hidden: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    inner: int,
    vocabulary: int,
    *,
    rope_theta: float,
    rms_norm_eps: float,
) -> LlamaShape:
    return LlamaShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
    )


SHAPES = (
    _shape(128, 4, 2, 32, 256, 320, rope_theta=500.0, rms_norm_eps=1e-5),
    _shape(128, 8, 2, 16, 384, 288, rope_theta=10000.0, rms_norm_eps=1e-2),
    # One key head for all, and heads wider together than the hidden size.
    _shape(128, 4, 1, 64, 256, 352, rope_theta=1e6, rms_norm_eps=1e-6),
)
"""Every width is a multiple of 128: whole blocks of 32, 64 and 128 in each row, whole GPTQ groups. Rotary base and
norm epsilon differ, and are not all a library's defaults: one that ignores config.json shows."""

DEEP_SHAPE = replace(_shape(128, 2, 1, 128, 256, 40_000, rope_theta=5e5, rms_norm_eps=1e-5), num_hidden_layers=4)
"""Past the sizes at which short cuts end: four layers, heads of 128, and more tokens than 15 bits can name."""

UNEVEN_SHAPE = _shape(72, 4, 2, 18, 104, 300, rope_theta=2000.0, rms_norm_eps=1e-5)
"""No row holds a whole number of blocks, and some tensors end in half a block of 64."""


@dataclass(frozen=True, slots=True)
class GptqKind:
    """How a GPTQ checkpoint is packed. `act_order` scatters the inputs of a group over the layer."""

    symmetric: bool = True
    act_order: bool = False
    convention: ZeroPointConvention = ZeroPointConvention.V1


USUAL_GPTQ = GptqKind()


@dataclass(frozen=True, slots=True, eq=False)
class TinyModel:
    """A model on disk. `tensors` are the weights as drawn; `stored` what a quantized file decodes to, by module."""

    folder: Path
    shape: LlamaShape
    tensors: Tensors
    stored: Mapping[str, Float64] | None = None


def draw_tensors(shape: LlamaShape, random: np.random.Generator) -> Tensors:
    """Random weights whose logits spread like a trained model's: every product keeps the variance of its input."""
    tensors = {EMBEDDING: random.normal(size=(shape.vocab_size, shape.hidden_size))}
    for name, linear in linear_shapes(shape).items():
        tensors[f"{name}.weight"] = random.normal(size=linear.weight) / linear.inputs**0.5
    if not shape.tie_word_embeddings:
        tensors[HEAD] = 2.0 * random.normal(size=(shape.vocab_size, shape.hidden_size)) / shape.hidden_size**0.5
    for name in norm_names(shape):
        # Norms start at 1 in real models; a wrong one would not show there.
        tensors[f"{name}.weight"] = 1.0 + 0.2 * random.normal(size=shape.hidden_size)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def linear_shapes(shape: LlamaShape) -> dict[str, LinearShape]:
    """Module path -> shape of every linear layer, the head left out."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    of_layer = {
        "self_attn.q_proj": LinearShape(hidden, queries),
        "self_attn.k_proj": LinearShape(hidden, keys),
        "self_attn.v_proj": LinearShape(hidden, keys),
        "self_attn.o_proj": LinearShape(queries, hidden),
        "mlp.gate_proj": LinearShape(hidden, inner),
        "mlp.up_proj": LinearShape(hidden, inner),
        "mlp.down_proj": LinearShape(inner, hidden),
    }
    return {
        f"model.layers.{layer}.{name}": sides
        for layer in range(shape.num_hidden_layers)
        for name, sides in of_layer.items()
    }


def norm_names(shape: LlamaShape) -> list[str]:
    places = ("input_layernorm", "post_attention_layernorm")
    return ["model.norm"] + [f"model.layers.{n}.{place}" for n in range(shape.num_hidden_layers) for place in places]


def write_model(
    folder: Path, shape: LlamaShape, tensors: Mapping[str, Float32], *, stored_dtype: str = "float32"
) -> TinyModel:
    """Plain weights in float32, float16 or bfloat16; `tensors` of the result are what the file really holds."""
    kept = {name: _rounded(tensor, stored_dtype) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {name: _as_stored(t, stored_dtype) for name, t in kept.items()})
    write_config(folder, shape, dtype=stored_dtype)
    return TinyModel(folder, shape, kept)


def write_config(
    folder: Path, shape: LlamaShape, *, dtype: str = "float32", more: Mapping[str, object] | None = None
) -> None:
    """`config.json` with the names of transformers 4 and 5 and of mlx-lm."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
        **(more or {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_quantized(
    folder: Path,
    shape: LlamaShape,
    tensors: Mapping[str, Float32],
    quantization: Quantization,
    *,
    gptq: GptqKind = USUAL_GPTQ,
) -> TinyModel:
    """The linear layers already packed, in the layout that belongs to the format; the rest in float32. A tensor that is
    left out is left out."""
    linears = linear_shapes(shape)
    arrays: dict[str, Array] = {n: t for n, t in tensors.items() if n.removesuffix(".weight") not in linears}
    stored: dict[str, Float64] = {}
    for module in linears:
        if f"{module}.weight" in tensors:
            packed, stored[module] = _packed(module, tensors[f"{module}.weight"], quantization, gptq)
            arrays.update(packed)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {name: (_safe_name(a), a) for name, a in arrays.items()})
    write_config(folder, shape, more=_described(quantization, gptq))
    return TinyModel(folder, shape, dict(tensors), stored)


def _packed(
    module: str, weight: Float32, quantization: Quantization, gptq: GptqKind
) -> tuple[dict[str, Array], Float64]:
    match quantization.weight_format:
        case WeightFormat.NF4 | WeightFormat.FP4:
            return _packed_four_bit(module, weight, quantization)
        case WeightFormat.INT8:
            codes, row_absmax = quantize_int8_rows(weight)
            return {f"{module}.weight": codes, f"{module}.SCB": row_absmax}, dequantize_int8_rows(codes, row_absmax)
        case WeightFormat.INT4_GPTQ:
            return _packed_gptq(module, weight, quantization, gptq)
        case WeightFormat.NONE:
            raise ValueError("there is no packed layout of weights that are not quantized")
        case mlx_format:
            return _packed_by_mlx(module, weight, mlx_format, quantization.block_size)


def _packed_by_mlx(
    module: str, weight: Float32, weight_format: WeightFormat, group_size: int | None
) -> tuple[dict[str, Array], Float64]:
    if weight_format in MICROSCALING_FORMATS:
        floats = quantize_microscaling(weight, MicroscalingFormat(weight_format.value))
        arrays: dict[str, Array] = {f"{module}.weight": floats.packed, f"{module}.scales": floats.scale_codes}
        return arrays, dequantize_microscaling(floats)
    affine = quantize_mlx_affine(weight, bits=AFFINE_BITS[weight_format], group_size=group_size or 64)
    arrays = {
        f"{module}.weight": affine.packed,
        f"{module}.scales": affine.scales,
        f"{module}.biases": affine.biases,
    }
    return arrays, dequantize_mlx_affine(affine)


def _packed_four_bit(module: str, weight: Float32, quantization: Quantization) -> tuple[dict[str, Array], Float64]:
    """bitsandbytes' layout (0.50.2, `functional.QuantState.as_dict(packed=True)`)."""
    kind = FourBitFormat(quantization.weight_format.value)
    size = quantization.block_size or 64
    four_bit = quantize_four_bit(weight, weight_format=kind, block_size=size)
    state: dict[str, object] = {"quant_type": kind.value, "blocksize": size, "dtype": "float32"}
    state["shape"] = list(weight.shape)
    absmax: Array = four_bit.absmax
    decoded_absmax: Float64 = four_bit.absmax.astype(np.float64)
    arrays: dict[str, Array] = {
        f"{module}.weight": four_bit.packed.reshape(-1, 1),
        f"{module}.weight.quant_map": NF4 if kind is FourBitFormat.NF4 else FP4,
    }
    if quantization.double_quant:
        nested = quantize_absmax(four_bit.absmax)
        absmax = nested.codes
        decoded_absmax = dequantize_absmax(nested.codes, nested.nested_absmax, nested.offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(nested.offset)}
        arrays[f"{module}.weight.nested_absmax"] = nested.nested_absmax
        arrays[f"{module}.weight.nested_quant_map"] = dynamic_8bit()
    arrays[f"{module}.weight.absmax"] = absmax
    name = f"{module}.weight.quant_state.bitsandbytes__{kind.value}"
    arrays[name] = np.frombuffer(json.dumps(state).encode("utf-8"), dtype=np.uint8)
    return arrays, dequantize_four_bit(four_bit.packed, decoded_absmax, FourBitLayout(kind, size, weight.shape))


def _packed_gptq(
    module: str, weight: Float32, quantization: Quantization, kind: GptqKind
) -> tuple[dict[str, Array], Float64]:
    """Four bits have no NaN: a value that is not finite becomes the scale of its group."""
    groups: Int32 = (np.arange(weight.shape[1]) // (quantization.block_size or 128)).astype(np.int32)
    if kind.act_order:
        groups = np.random.default_rng(len(groups)).permutation(groups)
    finite = np.where(np.isfinite(weight), weight, np.float32(0.0))
    grid = min_max_grid(finite, groups, bits=4, symmetric=kind.symmetric)
    codes = round_to_grid(finite, grid, groups, bits=4)
    for row, column in np.argwhere(~np.isfinite(weight)):
        grid.steps[groups[column], row] = weight[row, column]
    gptq = pack_gptq(codes, grid, groups, bits=4, convention=kind.convention)
    arrays: dict[str, Array] = {
        f"{module}.qweight": gptq.qweight,
        f"{module}.qzeros": gptq.qzeros,
        f"{module}.scales": gptq.scales,
        f"{module}.g_idx": gptq.g_idx,
    }
    return arrays, dequantize_gptq(gptq)


def _described(quantization: Quantization, gptq: GptqKind) -> dict[str, object]:
    """How config.json tells of the format."""
    weight_format, size = quantization.weight_format, quantization.block_size
    match weight_format:
        case WeightFormat.NF4 | WeightFormat.FP4:
            described: dict[str, object] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": weight_format.value,
                "bnb_4bit_use_double_quant": quantization.double_quant,
                "bnb_4bit_compute_dtype": "float32",
            }
        case WeightFormat.INT8:
            described = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        case WeightFormat.INT4_GPTQ:
            described = {"quant_method": "gptq", "bits": 4, "group_size": size}
            described |= {"sym": gptq.symmetric, "desc_act": gptq.act_order}
            described["checkpoint_format"] = gptq.convention.value
        case _:
            bits = 8 if weight_format is WeightFormat.MXFP8 else AFFINE_BITS.get(weight_format, 4)
            mode = weight_format.value if weight_format in MICROSCALING_FORMATS else "affine"
            return {"quantization": {"group_size": size, "bits": bits, "mode": mode}}
    return {"quantization_config": described}


def write_safetensors(path: Path, arrays: Mapping[str, tuple[str, Array]]) -> None:
    """name -> (safetensors dtype, little-endian array). Format: https://huggingface.co/docs/safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    # A new file, never new contents: a backend may still have the old one mapped.
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


_SAFE_NAMES = {
    "float32": "F32", "float16": "F16", "int32": "I32", "uint32": "U32", "int8": "I8", "uint8": "U8",
}  # fmt: skip


def _safe_name(array: Array) -> str:
    return _SAFE_NAMES[array.dtype.name]


def _rounded(tensor: Float32, dtype: str) -> Float32:
    if dtype == "bfloat16":
        return round_to_bfloat16(tensor)
    return tensor.astype(dtype).astype(np.float32)


def _as_stored(tensor: Float32, dtype: str) -> tuple[str, Array]:
    if dtype == "bfloat16":
        return "BF16", (np.ascontiguousarray(tensor).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    array = tensor.astype(dtype)
    return _safe_name(array), array


def tied(shape: LlamaShape) -> LlamaShape:
    """The same sizes with the embedding as head."""
    return replace(shape, tie_word_embeddings=True)
