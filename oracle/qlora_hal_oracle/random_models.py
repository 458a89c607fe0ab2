"""Small Llamas and their relatives, drawn from a generator and written with NumPy alone.

A model is a folder as a hub would hold it: `config.json` and `model.safetensors`, plain or already quantized in the
layout of a weight format.
"""

from __future__ import annotations

import json
import math
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
from qlora_hal.formats.catalogue import record_of

from .arrays import Float32, Float64
from .codecs import Codec, MicroscalingCodec
from .microscaling import MicroscalingFormat
from .roundoff import round_to_bfloat16
from .shape import LlamaShape

Array = npt.NDArray[Any]
Tensors = dict[str, Float32]
Config = Mapping[str, object]

FIRST_ORDINARY_TOKEN = 3
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight")
STACK = ".experts."
UNPACKED_OF_GPT_OSS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


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

LONG_SHAPE = _shape(128, 2, 1, 64, 256, 320, rope_theta=500.0, rms_norm_eps=1e-5)
"""For rows of many tokens: few heads, because float64 attention over a thousand tokens is what such a case costs."""

UNEVEN_SHAPE = _shape(72, 4, 2, 18, 104, 300, rope_theta=2000.0, rms_norm_eps=1e-5)
"""No row holds a whole number of blocks, and some tensors end in half a block of 64."""


@dataclass(frozen=True, slots=True, eq=False)
class TinyModel:
    """A model on disk. `tensors` are the weights as drawn; `stored` what a quantized file decodes to, by module."""

    folder: Path
    shape: LlamaShape
    tensors: Tensors
    stored: Mapping[str, Float64] | None = None


def draw_plain_shape(random: np.random.Generator, **sizes: int) -> LlamaShape:
    """A small plain Llama with some sizes given, as wide as the least whole number of blocks that its heads divide."""
    heads = sizes.get("num_attention_heads", 4)
    return LlamaShape(
        **{  # type: ignore[arg-type]
            "vocab_size": int(random.integers(290, 420)),
            "hidden_size": math.lcm(heads, 128),
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_theta": float(random.choice((500.0, 10000.0))),
            "rms_norm_eps": 1e-5,
            **sizes,
        }
    )


def draw_tensors(shape: LlamaShape, random: np.random.Generator) -> Tensors:
    """Random weights whose logits spread like a trained model's: every product keeps the variance of its input."""
    drawn = {}
    for name, sides in shape.tensor_shapes().items():
        center, spread = _center_and_spread(name, sides, shape)
        drawn[name] = (center + spread * random.normal(size=sides)).astype(np.float32)
    return drawn


def _center_and_spread(name: str, sides: tuple[int, ...], shape: LlamaShape) -> tuple[float, float]:
    if name == EMBEDDING:
        return 0.0, 1.0 / shape.embedding_scale
    if name == HEAD:
        return 0.0, 2.0 / (shape.logits_scale * shape.hidden_size**0.5)
    if name.endswith("norm.weight"):
        # Norms start at 1 in real models; a wrong one would not show there.
        return 1.0 - shape.norm_offset, 0.2
    if name.endswith("bias"):
        return 0.0, 0.3
    if name.endswith("sinks"):
        return 0.0, 1.0
    # A router tells experts apart: logits of 2, so that weights of chosen experts differ.
    return 0.0, (2.0 if name.endswith(ROUTERS) else 1.0) / sides[-1] ** 0.5


def stored_one_by_one(tensors: Mapping[str, Float32]) -> Tensors:
    """As the hub's checkpoints have stacks of experts: `experts.w1.weight` is `experts.0.w1.weight`, and so on."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            found |= {name.replace(STACK, f"{STACK}{expert}."): weight for expert, weight in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def is_joined(shape: LlamaShape) -> bool:
    """Whether checkpoints have all experts of a block in one tensor."""
    return shape.mixture is not None and shape.mixture.joined


def stored_joined(tensors: Mapping[str, Float32]) -> Tensors:
    """As gpt-oss has its experts: `[experts, in, out]`, gate and up in turns along the last side, and their biases."""
    found = {name: tensor for name, tensor in tensors.items() if STACK not in name}
    for block in sorted({name.partition(STACK)[0] + STACK for name in tensors if STACK in name}):
        for part, ending in (("weight", ""), ("bias", "_bias")):
            if f"{block}down_proj.{part}" not in tensors:
                continue
            gate, up, down = (tensors[f"{block}{name}_proj.{part}"] for name in ("gate", "up", "down"))
            if part == "weight":
                gate, up, down = (np.swapaxes(tensor, 1, 2) for tensor in (gate, up, down))
            both = np.stack((gate, up), axis=-1)
            found[f"{block}gate_up_proj{ending}"] = both.reshape(*both.shape[:-2], -1)
            found[f"{block}down_proj{ending}"] = np.ascontiguousarray(down)
    return found


def linear_shapes(shape: LlamaShape) -> dict[str, LinearShape]:
    """Module path -> shape of every linear layer that can carry an adapter, the head left out; a stack of experts is
    one."""
    return {
        f"model.layers.{layer}.{name}": LinearShape(sides[-1], sides[-2], *sides[:-2])
        for layer in range(shape.num_hidden_layers)
        for name, sides in shape.layer_linears(layer).items()
    }


def write_model(
    folder: Path,
    shape: LlamaShape,
    tensors: Mapping[str, Float32],
    *,
    stored_dtype: str = "float32",
    files: int = 1,
    config: Config | None = None,
) -> TinyModel:
    """Plain weights in float32, float16 or bfloat16, in one file or in several with an index; `tensors` of the result
    are what the files really hold. `config` is the config.json of a model that is no plain Llama."""
    kept = {name: _rounded(tensor, stored_dtype) for name, tensor in tensors.items()}
    laid_out = stored_joined(kept) if is_joined(shape) else stored_one_by_one(kept)
    stored = {name: _as_stored(t, stored_dtype) for name, t in laid_out.items()}
    write_weights(folder, stored, files=files)
    write_config(folder, shape, dtype=stored_dtype, config=config)
    return TinyModel(folder, shape, kept)


def write_weights(folder: Path, arrays: Mapping[str, tuple[str, Array]], *, files: int = 1) -> None:
    """`model.safetensors`, or several files and their index. Each file holds tensors of every layer and kind, and the
    embedding is in the last: whoever reads one file alone, or takes one for a layer, lacks something."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return
    names = sorted(arrays, key=lambda name: (name != EMBEDDING, name))
    index: dict[str, str] = {}
    for number in range(files):
        file = f"model-{files - number:05d}-of-{files:05d}.safetensors"
        write_safetensors(folder / file, {name: arrays[name] for name in names[number::files]})
        index |= dict.fromkeys(names[number::files], file)
    whole = {"metadata": {"total_size": sum(array.nbytes for _, array in arrays.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def write_config(
    folder: Path,
    shape: LlamaShape,
    *,
    dtype: str = "float32",
    more: Config | None = None,
    config: Config | None = None,
) -> None:
    """`config.json`, by default a plain Llama's."""
    told = {**(plain_config(shape) if config is None else config), "torch_dtype": dtype, **(more or {})}
    (folder / "config.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def plain_config(shape: LlamaShape) -> dict[str, object]:
    """The config.json of a plain Llama, with the names of transformers 4 and 5 and of mlx-lm."""
    return {
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
    }


def write_quantized(
    folder: Path,
    shape: LlamaShape,
    tensors: Mapping[str, Float32],
    quantization: Quantization,
    *,
    codec: Codec | None = None,
    stored_dtype: str = "float32",
    files: int = 1,
    config: Config | None = None,
) -> TinyModel:
    """The linear layers already packed, as the format's codec writes them, or another one of the format's, each expert
    by itself; the rest in `stored_dtype`. A tensor that is left out is left out. Raises ValueError for a format in
    which nothing is packed. MXFP4 of a gpt-oss is in its own layout, of the experts alone."""
    if is_joined(shape) and quantization.weight_format == WeightFormat.MXFP4:
        return _write_published(folder, shape, tensors, stored_dtype=stored_dtype, files=files, config=config)
    record = record_of(quantization.weight_format)
    if record.layout is None:
        raise ValueError("there is no packed layout of weights that are not quantized")
    codec, size = codec or record.codec, quantization.block_size or record.default_block
    linears = linear_shapes(shape)
    rest = {n: _rounded(t, stored_dtype) for n, t in tensors.items() if n.removesuffix(".weight") not in linears}
    arrays = {name: _as_stored(tensor, stored_dtype) for name, tensor in rest.items()}
    stored: dict[str, Float64] = {}
    for module in linears:
        decoded = []
        for name, weight in stored_one_by_one(_only(f"{module}.weight", tensors)).items():
            packed, path = codec.quantize(weight, size, quantization.double_quant), name.removesuffix(".weight")
            decoded.append(codec.dequantize(packed))
            arrays |= {path + suffix: (_safe_name(tensor), tensor) for suffix, tensor in packed.items()}
        if decoded:
            stored[module] = np.stack(decoded) if linears[module].experts > 1 else decoded[0]
    write_weights(folder, arrays, files=files)
    described = codec.description(size, quantization.double_quant)
    write_config(folder, shape, dtype=stored_dtype, more=described, config=config)
    return TinyModel(folder, shape, {**tensors, **rest}, stored)


def _write_published(
    folder: Path,
    shape: LlamaShape,
    tensors: Mapping[str, Float32],
    *,
    stored_dtype: str,
    files: int,
    config: Config | None,
) -> TinyModel:
    """As gpt-oss is on the hub: `_blocks` and `_scales` of each projection, a row of bytes to each output, gate and up
    in turns; all else is plain (transformers 5.23, `integrations/mxfp4.py`)."""
    codec = MicroscalingCodec(MicroscalingFormat.MXFP4)
    experts = {name: tensor for name, tensor in tensors.items() if STACK in name and name.endswith(".weight")}
    rest = {name: _rounded(tensor, stored_dtype) for name, tensor in tensors.items() if name not in experts}
    arrays = {name: _as_stored(tensor, stored_dtype) for name, tensor in stored_joined(rest).items()}
    codes: dict[str, Array] = {}
    stored: dict[str, Float64] = {}
    for name, stack in experts.items():
        packed = [codec.quantize(weight, None) for weight in stack]
        stored[name.removesuffix(".weight")] = np.stack([codec.dequantize(one) for one in packed])
        bytes_of_rows = np.stack([one[".weight"].view(np.uint8) for one in packed])
        codes[f"{name}_blocks"] = bytes_of_rows.reshape(*bytes_of_rows.shape[:2], -1, 16)
        codes[f"{name}_scales"] = np.stack([one[".scales"] for one in packed])
    for block in sorted({name.partition(STACK)[0] + STACK for name in experts}):
        for part in ("blocks", "scales"):
            gate, up, down = (codes[f"{block}{name}_proj.weight_{part}"] for name in ("gate", "up", "down"))
            both = np.stack((gate, up), axis=2)
            arrays[f"{block}gate_up_proj_{part}"] = "U8", both.reshape(len(both), -1, *both.shape[3:])
            arrays[f"{block}down_proj_{part}"] = "U8", down
    write_weights(folder, arrays, files=files)
    described = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": list(UNPACKED_OF_GPT_OSS)}}
    write_config(folder, shape, dtype=stored_dtype, more=described, config=config)
    return TinyModel(folder, shape, {**tensors, **rest}, stored)


def _only(name: str, tensors: Mapping[str, Float32]) -> Tensors:
    return {name: tensors[name]} if name in tensors else {}


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
