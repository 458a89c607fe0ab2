"""From a folder of safetensors to the base weights of a Llama, quantized here or already in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.files.safetensors_file import Array, read_arrays
from qlora_hal.formats.catalogue import record_of
from qlora_hal.formats.record import FormatRecord
from qlora_hal.model.expert_stacks import path_of
from qlora_hal.model.source import ModelSource
from qlora_hal_oracle import FourBitFormat, FourBitLayout, FourBitWeight, LlamaShape, QuantizedAbsmax, read_shape
from qlora_hal_oracle.arrays import Float64

from .rounding import Round
from .storage import BlockwiseFourBit, Coded, RowwiseInt8, Stored

_JOINED = re.compile(r"(?P<block>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)(_(?P<part>bias|blocks|scales))?")
Pack = Callable[[Array, Quantization], Stored]
Unpack = Callable[[Stored], Float64]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBase:
    """`weights` as the products see them, by Hugging Face's names; `linear_modules` (in, out) by module path."""

    shape: LlamaShape
    weights: dict[str, Float64]
    linear_modules: Mapping[str, LinearShape]


def load_base(
    source: ModelSource, quantization: Quantization, rounded: Round, decoded: Round, pack: Pack, unpack: Unpack
) -> LoadedBase:
    """Read every tensor, quantize the linear layers, experts one by one. These are kept as `decoded` rounds them, the
    rest as `rounded` does.

    Raises ModelError (QH-M50) with every tensor that is missing, left over or of another shape.
    """
    tensors: dict[str, Array] = {}
    for file in sorted({facts.file for facts in source.facts.tensors.values()}):
        tensors.update(read_arrays(source.path / file).arrays)
    tensors = one_by_one(tensors)
    linear_modules, packed = dict(source.facts.linear_modules), source.facts.prequantized
    record = record_of(packed.weight_format) if packed is not None else None
    weights: dict[str, Float64] = {}

    def read(module: str) -> Float64 | None:
        if not any(module + suffix in tensors for suffix in _weight_suffixes(record)):
            return None
        stored = _take_packed(tensors, module, record)
        if stored is None:
            weight = tensors.pop(f"{module}.weight")
            own = Quantization(WeightFormat.NONE) if packed is not None else quantization
            record_of(own.weight_format).require_whole_blocks(module, weight.shape[-1], own.block_size, source.name)
            stored = pack(weight, own)
        return decoded(unpack(stored))

    for module, linear in linear_modules.items():
        paths = [module] if linear.experts == 1 else [path_of(module, expert) for expert in range(linear.experts)]
        found = [weight for weight in map(read, paths) if weight is not None]
        if found:
            weights[f"{module}.weight"] = found[0] if linear.experts == 1 else np.stack(found)
    weights |= {name: rounded(tensor.astype(np.float64)) for name, tensor in tensors.items() if _is_weight(name)}
    shape = _shape(source)
    _check_complete(source, shape, weights)
    return LoadedBase(shape, weights, linear_modules)


def one_by_one(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of all experts of a gpt-oss, gate and up in turns, as those of each expert; its bytes of MXFP4 under
    the names that MLX gives them."""
    found: dict[str, Array] = {}
    for name, array in tensors.items():
        joined = _JOINED.fullmatch(name)
        if joined is None:
            found[name] = array
            continue
        part = joined["part"] or "weight"
        rows = array if part in ("blocks", "scales", "bias") else np.swapaxes(array, 1, 2)  # [experts, out, ...]
        halves = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
        for projection, stack in (halves if joined["projection"] == "gate_up_proj" else {"down_proj": rows}).items():
            if part == "bias":
                found[f"{joined['block']}.{projection}.bias"] = stack
                continue
            for number, one in enumerate(stack):
                path = path_of(f"{joined['block']}.{projection}", number)
                if part == "blocks":
                    found[f"{path}.weight"] = np.ascontiguousarray(one.reshape(len(one), -1)).view(np.uint32)
                else:
                    found[f"{path}.{part}"] = np.ascontiguousarray(one)
    return found


def _weight_suffixes(record: FormatRecord | None) -> set[str]:
    layout = record.layout if record is not None else None
    return {".weight"} if layout is None else {".weight", layout.weight}


def _take_packed(tensors: dict[str, Array], module: str, record: FormatRecord | None) -> Stored | None:
    """What is stored of a packed module, taken out of `tensors`; None for an ordinary weight."""
    parts = {name.removeprefix(f"{module}."): name for name in tensors if name.startswith(f"{module}.weight.")}
    described = next((part for part in parts if "quant_state.bitsandbytes__" in part), None)
    if described is not None:
        arrays = {part: tensors.pop(name) for part, name in parts.items()}
        return _four_bit(tensors.pop(f"{module}.weight"), json.loads(arrays[described].tobytes()), arrays)
    if f"{module}.SCB" in tensors:
        tensors.pop(f"{module}.weight_format", None)
        return RowwiseInt8(tensors.pop(f"{module}.weight").view(np.int8), tensors.pop(f"{module}.SCB"))
    layout = record.layout if record is not None else None
    if record is None or layout is None or module + layout.marks[0] not in tensors:
        return None
    suffixes = [suffix for suffix in layout.suffixes if module + suffix in tensors]
    return Coded({suffix: tensors.pop(module + suffix) for suffix in suffixes}, record.codec)


def _four_bit(packed: Array, state: Mapping[str, object], arrays: Mapping[str, Array]) -> BlockwiseFourBit:
    """bitsandbytes 0.50.2, `functional.QuantState.as_dict(packed=True)`."""
    shape = tuple(int(side) for side in state["shape"])  # type: ignore[attr-defined]
    layout = FourBitLayout(FourBitFormat(state["quant_type"]), int(str(state["blocksize"])), shape)
    absmax = arrays["weight.absmax"]
    if "weight.nested_absmax" not in arrays:
        return BlockwiseFourBit(FourBitWeight(packed.reshape(-1), absmax, layout))
    nested = QuantizedAbsmax(absmax, arrays["weight.nested_absmax"], np.float32(str(state["nested_offset"])))
    return BlockwiseFourBit(FourBitWeight(packed.reshape(-1), np.zeros(0, np.float32), layout), nested)


def _is_weight(name: str) -> bool:
    # Rotary frequencies that older checkpoints carry are computed anew.
    return not name.endswith("rotary_emb.inv_freq")


def _shape(source: ModelSource) -> LlamaShape:
    try:
        return read_shape(source.facts.config)
    except ValueError as error:
        raise ModelError(
            "QH-M50",
            f"config.json describes a model that is not computed here: {error}.",
            where=source.name,
            fix="Use another backend: this one computes Llamas and some of their relatives.",
        ) from error


def _check_complete(source: ModelSource, shape: LlamaShape, weights: Mapping[str, Float64]) -> None:
    expected = shape.tensor_shapes()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [
        f"{name} is {list(weight.shape)}, config.json asks for {list(expected[name])}"
        for name, weight in weights.items()
        if name in expected and weight.shape != expected[name]
    ]
    allowed = {"lm_head.weight", *expected}
    wrong += [f"{name} is left over" for name in weights if name not in allowed]
    if wrong:
        raise ModelError(
            "QH-M50",
            f"The checkpoint and config.json do not match in {len(wrong)} tensors: {'; '.join(wrong[:5])}.",
            where=source.name,
            fix="Check that the folder is complete and that config.json belongs to it.",
            context={"wrong": wrong},
        )
