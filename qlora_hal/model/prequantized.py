"""Checkpoints that are quantized already: how, and the true shapes behind their packed tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.files import strict_json
from qlora_hal.files.safetensors_file import TensorEntry
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal.model.safetensors_headers import Header, read_tensor_bytes
from qlora_hal.model.weight_files import read_json

_BNB_STATE = ".weight.quant_state.bitsandbytes__"
_READABLE = "bitsandbytes (nf4, fp4, int8), gptq (4 bits), mlx (affine in 2, 3, 4, 5, 6 or 8 bits, mxfp4, nvfp4, mxfp8)"


@dataclass(frozen=True, slots=True)
class Packing:
    """A recognised quantization. `shapes` are the true (in, out) of packed modules, `belongings` the suffixes of
    tensors that only describe a packed weight and are no parameters of the model."""

    prequantized: Prequantized
    shapes: Mapping[str, LinearShape]
    belongings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, Path]

    def modules_with(self, suffix: str) -> list[str]:
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.contradiction(f"{name} is missing")
        return self.tensors[name].shape

    def contradiction(self, what: str) -> ModelError:
        return ModelError(
            "QH-C73",
            f"The checkpoint contradicts its own description: {what}.",
            where=str(self.folder),
            fix="Get the model again from its source, all files from one revision.",
        )


def read_packing(folder: Path, config: Mapping[str, object], headers: Sequence[Header]) -> Packing | None:
    """How a checkpoint is packed, or None for ordinary weights.

    Raises ModelError: QH-C72 for a method or width that no backend has, QH-C73 when description and tensors
    disagree.
    """
    checkpoint = _Checkpoint(
        folder,
        config,
        {name: tensor for header in headers for name, tensor in header.tensors.items()},
        {name: header.path for header in headers for name in header.tensors},
    )
    method = _method(checkpoint)
    return _READERS[method](checkpoint) if method else None


def _method(checkpoint: _Checkpoint) -> str:
    described = checkpoint.config.get("quantization_config")
    declared = str(described.get("quant_method", "")) if isinstance(described, dict) else ""
    names = checkpoint.tensors
    if any(_BNB_STATE in name for name in names):
        return "bitsandbytes 4-bit"
    if any(name.endswith(".SCB") for name in names):
        return "bitsandbytes int8"
    if any(name.endswith(".qweight") for name in names) and declared in {"", "gptq"}:
        return "gptq"
    if any(name.endswith(".B") and f"{name[:-1]}s" in names for name in names):
        raise _only_for_marlin(checkpoint)
    if isinstance(checkpoint.config.get("quantization"), dict) and checkpoint.modules_with(".scales"):
        return "mlx"
    # Ordinary weights under a bitsandbytes description: the run's own configuration decides how to quantize them.
    if declared in {"", "bitsandbytes"}:
        return ""
    raise _unsupported(checkpoint, f"quantized with {declared}")


def _unsupported(checkpoint: _Checkpoint, what: str) -> ModelError:
    return ModelError(
        "QH-C72",
        f"The model is {what}; readable are {_READABLE}.",
        where=str(checkpoint.folder),
        fix="Name the model's unquantized version; it is quantized while loading.",
    )


def _only_for_marlin(checkpoint: _Checkpoint) -> ModelError:
    """Marlin's repacking (IST-DASLab/marlin) serves its own inference kernel, which has no backward pass."""
    return ModelError(
        "QH-C72",
        f"The model is packed for the Marlin kernel only; readable are {_READABLE}.",
        where=str(checkpoint.folder),
        cause="Marlin computes the forward pass only, and its layout is read by no other kernel.",
        fix="Choose a GPTQ version of the model in format gptq or gptq_v2; inference can repack that for Marlin.",
    )


# bitsandbytes -------------------------------------------------------------------------------------------------------
def _bitsandbytes_4bit(checkpoint: _Checkpoint) -> Packing:
    """Each weight is a column of bytes; a uint8 tensor beside it holds JSON with the shape and the block size.

    Source: bitsandbytes 0.50.2, `functional.QuantState.as_dict(packed=True)`.
    """
    shapes: dict[str, LinearShape] = {}
    kinds: dict[tuple[str, int, bool], str] = {}
    for name in checkpoint.tensors:
        module, found, quant_type = name.partition(_BNB_STATE)
        if found:
            state = _bnb_state(checkpoint, name)
            shapes[module] = _bnb_shape(checkpoint, module, state)
            kinds.setdefault(
                (quant_type, _whole(checkpoint, name, state.get("blocksize")), "nested_blocksize" in state), module
            )
    if len(kinds) > 1:
        raise checkpoint.contradiction(
            "its modules are quantized in different ways: "
            + "; ".join(f"{module}: {kind}, block {block}" for (kind, block, _), module in kinds.items())
        )
    ((quant_type, block_size, double_quant),) = kinds
    if quant_type not in {"nf4", "fp4"}:
        raise _unsupported(checkpoint, f"quantized with bitsandbytes {quant_type}")
    belongings = (
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        f".quant_state.bitsandbytes__{quant_type}",
    )
    facts = Prequantized("bitsandbytes", quant_type, block_size, double_quant, {"bits": 4})
    return Packing(facts, shapes, tuple(".weight" + suffix for suffix in belongings))


def _bnb_state(checkpoint: _Checkpoint, name: str) -> dict[str, object]:
    raw = read_tensor_bytes(checkpoint.files[name], checkpoint.tensors[name])
    try:
        state = strict_json.decode_foreign(raw)
        if not isinstance(state, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise checkpoint.contradiction(f"{name} is not the JSON of a quantization state ({error})") from error
    return state


def _bnb_shape(checkpoint: _Checkpoint, module: str, state: Mapping[str, object]) -> LinearShape:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise checkpoint.contradiction(f"{module} has the quantization state of shape {shape!r}, not [out, in]")
    rows, columns = (_whole(checkpoint, module, side) for side in shape)
    packed = checkpoint.tensors.get(f"{module}.weight")
    if packed is None or packed.byte_count != (rows * columns + 1) // 2:
        stored = "no" if packed is None else str(packed.byte_count)
        raise checkpoint.contradiction(
            f"{module}.weight has {stored} bytes, [{rows}, {columns}] in 4 bits needs another number"
        )
    return LinearShape(columns, rows)


def _bitsandbytes_int8(checkpoint: _Checkpoint) -> Packing:
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".SCB"):
        shape = checkpoint.shape(f"{module}.weight")
        if len(shape) != 2 or checkpoint.shape(f"{module}.SCB") != shape[:1]:
            raise checkpoint.contradiction(f"{module}.SCB does not hold one scale for each row of {list(shape)}")
        shapes[module] = LinearShape(shape[1], shape[0])
    facts = Prequantized("bitsandbytes", "int8", None, False, {"bits": 8})
    return Packing(facts, shapes, (".SCB", ".weight_format"))


# GPTQ ---------------------------------------------------------------------------------------------------------------
def _gptq(checkpoint: _Checkpoint) -> Packing:
    """`qweight` int32 [in * bits / 32, out], `scales` [groups, out], `qzeros`, `g_idx` [in] (auto-gptq 0.7.1)."""
    described = _gptq_description(checkpoint)
    bits = _whole(checkpoint, "bits", described.get("bits"))
    if bits != 4:
        raise _unsupported(checkpoint, f"quantized with GPTQ in {bits} bits")
    layout = _gptq_layout(checkpoint, described)
    group_size = described.get("group_size", -1)
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".qweight"):
        absent = [part for part in ("qzeros", "scales", "g_idx") if f"{module}.{part}" not in checkpoint.tensors]
        if absent:
            raise checkpoint.contradiction(f"{module} has a qweight but no {', '.join(absent)}")
        rows, columns = _two(checkpoint, f"{module}.qweight")
        inputs = rows * 32 // bits
        groups = checkpoint.shape(f"{module}.scales")[0]
        g_idx = checkpoint.tensors.get(f"{module}.g_idx")
        if g_idx is not None and g_idx.shape != (inputs,):
            raise checkpoint.contradiction(
                f"{module}.g_idx has shape {list(g_idx.shape)}, {bits} bits give {inputs} inputs"
            )
        if isinstance(group_size, int) and group_size > 0 and groups != -(-inputs // group_size):
            raise checkpoint.contradiction(
                f"{module} has {groups} groups, group_size {group_size} gives another number"
            )
        shapes[module] = LinearShape(inputs, columns)
    block_size = group_size if isinstance(group_size, int) and group_size > 0 else None
    kept = ("bits", "group_size", "sym", "desc_act", "true_sequential")
    settings = {key: described[key] for key in kept if key in described}
    settings["checkpoint_format"] = layout
    if writer := _written_by(described):
        settings["quantizer"] = writer
    facts = Prequantized("gptq", "int4_gptq", block_size, False, settings)
    return Packing(facts, shapes, (".qweight", ".qzeros", ".scales", ".g_idx"))


def _gptq_layout(checkpoint: _Checkpoint, described: Mapping[str, object]) -> str:
    """`gptq` (v1, also where old files do not say) or `gptq_v2`."""
    layout = described.get("checkpoint_format") or described.get("format") or "gptq"
    if described.get("is_marlin_format") or layout == "marlin":
        raise _only_for_marlin(checkpoint)
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(checkpoint, f"quantized with GPTQ in the layout {layout}")
    if described.get("pack_dtype", "int32") != "int32":
        raise _unsupported(checkpoint, f"quantized with GPTQ in words of {described['pack_dtype']}")
    return str(layout)


def _written_by(described: Mapping[str, object]) -> str:
    """`gptqmodel:7.6.0` and the like, "" where the description does not tell."""
    meta = described.get("meta")
    told = meta.get("quantizer") if isinstance(meta, dict) else None
    first = told[0] if isinstance(told, list) and told else told
    return first if isinstance(first, str) else ""


def _gptq_description(checkpoint: _Checkpoint) -> Mapping[str, object]:
    described = checkpoint.config.get("quantization_config")
    if isinstance(described, dict) and "bits" in described:
        return described
    for name in ("quantize_config.json", "quant_config.json"):
        if (checkpoint.folder / name).is_file():
            return read_json(checkpoint.folder / name)
    raise checkpoint.contradiction("it has GPTQ tensors, but neither quantization_config nor quantize_config.json")


# MLX ----------------------------------------------------------------------------------------------------------------
_MLX_FORMATS: Mapping[str, tuple[int, int]] = {
    **{f"int{bits}_affine": (bits, 0) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}
"""Weight format -> bits and its only group size; 0: any that MLX has."""


def _mlx(checkpoint: _Checkpoint) -> Packing:
    """`weight` uint32 [out, in * bits / 32], `scales` and, in the affine mode, `biases` [out, in / group]
    (mlx 0.32, `nn.quantize`)."""
    described = checkpoint.config["quantization"]
    assert isinstance(described, dict)
    mode = described.get("mode", "affine")
    bits = _whole(checkpoint, "quantization.bits", described.get("bits"))
    group_size = _whole(checkpoint, "quantization.group_size", described.get("group_size"))
    weight_format = f"int{bits}_affine" if mode == "affine" else str(mode)
    if weight_format not in _MLX_FORMATS or (mode != "affine" and (bits, group_size) != _MLX_FORMATS[weight_format]):
        raise _unsupported(checkpoint, f"quantized with MLX {mode} in {bits} bits and groups of {group_size}")
    shapes: dict[str, LinearShape] = {}
    for module in checkpoint.modules_with(".scales"):
        own = described.get(module)
        if isinstance(own, dict) and (own.get("bits"), own.get("group_size")) != (bits, group_size):
            raise _unsupported(checkpoint, f"quantized in several widths ({module}: {own.get('bits')} bits)")
        rows, words = _two(checkpoint, f"{module}.weight")
        inputs = words * 32 // bits
        for part in (".scales", ".biases") if mode == "affine" else (".scales",):
            if checkpoint.shape(module + part) != (rows, inputs // group_size):
                raise checkpoint.contradiction(f"{module}{part} does not fit {bits} bits in groups of {group_size}")
        if checkpoint.tensors.get(f"{module}.global_scale") is not None:
            raise _unsupported(checkpoint, f"quantized with a global scale ({module})")
        shapes[module] = LinearShape(inputs, rows)
    facts = Prequantized(
        "mlx", weight_format, group_size, False, {"bits": bits, "group_size": group_size, "mode": mode}
    )
    return Packing(facts, shapes, (".scales", ".biases"))


def _two(checkpoint: _Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.shape(name)
    if len(shape) != 2:
        raise checkpoint.contradiction(f"{name} has shape {list(shape)}, two sides are expected")
    return shape[0], shape[1]


def _whole(checkpoint: _Checkpoint, name: str, value: object) -> int:
    if type(value) is not int or value <= 0:
        raise checkpoint.contradiction(f"{name} holds {value!r} where a positive whole number is expected")
    return value


_READERS: Mapping[str, Callable[[_Checkpoint], Packing]] = {
    "bitsandbytes 4-bit": _bitsandbytes_4bit,
    "bitsandbytes int8": _bitsandbytes_int8,
    "gptq": _gptq,
    "mlx": _mlx,
}
