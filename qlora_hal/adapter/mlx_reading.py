"""Adapters in mlx-lm's layout (see `mlx_files`), read without MLX; what is more than plain LoRA is refused by name."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from qlora_hal.adapter.as_written import provenance_in, require_as_written
from qlora_hal.adapter.mlx_experts import hub_path, mlx_path
from qlora_hal.adapter.mlx_files import CONFIG_FILE, LORA, PROVENANCE_FILE, TENSORS_FILE, require_placeable, transposed
from qlora_hal.adapter.mlx_targets import MlxTargets
from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.values import Adapter, AdapterConfig, Float32
from qlora_hal.errors import AdapterError
from qlora_hal.files import safetensors_file, strict_json

_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
"""Of `lora_parameters`. mlx-lm reads no `alpha` today; see `_require_one_meaning`."""


def read_mlx_adapter(folder: Path, linear_modules: Collection[str] | None = None) -> Adapter:
    """An adapter that mlx-lm trained or that was written here. The tensors tell which modules it has, and
    adapter_config.json has to mean those.

    `num_layers` counts from the last layer, so an adapter may lack the first ones; with `linear_modules` (all of the
    model's) the last is known. alpha is scale r, or what `qlora_hal.json` says if it gives the same scale. float16 and
    bfloat16 become float32.
    Raises AdapterError: QH-C50 (no such adapter, or malformed), QH-C51 (DoRA, full fine-tuning, unknown parameters, a
    scale with two meanings),
    QH-C08 and QH-C09 (tensors that are not plain LoRA's, of another rank, or of modules that mlx-lm would give no
    adapter), QH-C11 (a dtype float32 cannot hold),
    QH-C65 (modules whose names differ elsewhere), QH-C22 (changed since qlora_hal wrote it), QH-C01;
    UnsafeInputError QH-C15, QH-C16.
    """
    raw_config = read_mlx_config(folder)
    parameters = _plain_parameters(raw_config, folder)
    stored = _read_tensors(folder)
    modules = _modules_of(stored.arrays, folder)
    require_placeable(modules, str(folder / TENSORS_FILE))
    config = _adapter_config(parameters, modules, folder)
    _require_rank(stored.arrays, config.r, folder)
    in_model = linear_modules and [mlx_path(module) for module in linear_modules]
    _refuse_left_out(raw_config, parameters, modules, in_model, folder)
    require_as_written(folder, _document(folder), stored.sha256, config)
    tensors: dict[str, Float32] = {}
    for module in modules:
        tensors[lora_a_key(hub_path(module))] = transposed(stored.arrays[f"{module}.lora_a"])
        tensors[lora_b_key(hub_path(module))] = transposed(stored.arrays[f"{module}.lora_b"])
    ours = replace(config, target_modules=tuple(sorted(map(hub_path, modules))))
    return Adapter({name: tensors[name] for name in sorted(tensors)}, ours)


def read_mlx_config(folder: Path) -> dict[str, object]:
    """`adapter_config.json` as it is. Raises AdapterError QH-C50."""
    return _read_json(folder / CONFIG_FILE)


def read_mlx_provenance(folder: Path) -> dict[str, object]:
    """What `qlora_hal.json` records; for an adapter of mlx-lm, the base that its configuration names.

    Raises AdapterError QH-C50 when a file is there but malformed.
    """
    if document := _document(folder):
        return {name: value for name, value in provenance_in(document).items() if name != LORA}
    return {"base_name": read_mlx_config(folder).get("model"), "base_revision": None}


def _document(folder: Path) -> dict[str, object]:
    """`qlora_hal.json` as it is; empty for an adapter of mlx-lm."""
    path = folder / PROVENANCE_FILE
    return _read_json(path) if os.path.lexists(path) else {}


def _plain_parameters(config: Mapping[str, object], folder: Path) -> Mapping[str, object]:
    """`lora_parameters`, when the adapter is plain LoRA and nothing else."""
    parameters = config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    found = [f"fine_tune_type={_short(kind)}"] if kind != "lora" else []
    found += [f"use_dora={_short(config['use_dora'])}"] if config.get("use_dora") else []
    if isinstance(parameters, dict):
        found += [
            f"lora_parameters.{name}={_short(parameters[name])}" for name in sorted(set(parameters) - _PARAMETERS)
        ]
    if found:
        raise AdapterError(
            "QH-C51",
            f"The adapter uses {len(found)} settings beyond plain LoRA: {', '.join(found)}.",
            where=str(folder / CONFIG_FILE),
            cause="They change what the tensors mean, so they are not dropped silently.",
            fix="Fuse it with mlx_lm.fuse, or train one with fine_tune_type lora.",
            context={"unsupported": found},
        )
    if not isinstance(parameters, dict):
        _refuse_file(folder / CONFIG_FILE, f"has lora_parameters = {_short(parameters)}, an object is expected")
    return parameters


def _adapter_config(parameters: Mapping[str, object], modules: tuple[str, ...], folder: Path) -> AdapterConfig:
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    where = folder / CONFIG_FILE
    if type(rank) is not int or rank < 1:
        _refuse_file(where, f"has rank = {_short(rank)}, a positive whole number is expected")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale * rank < 1e9:
        _refuse_file(where, f"has scale = {_short(scale)}, a positive number is expected")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        _refuse_file(where, f"has dropout = {_short(dropout)}, a number in [0, 1) is expected")
    recorded = _recorded(folder, rank, float(scale))
    _require_one_meaning(parameters, rank, float(scale), where)
    alpha, use_rslora = recorded or (_alpha(float(scale), rank), False)
    return AdapterConfig(rank, alpha, float(dropout), use_rslora, modules)


def _require_one_meaning(parameters: Mapping[str, object], rank: int, scale: float, where: Path) -> None:
    """Early mlx-lm multiplied by scale * alpha / rank; later ones by the scale alone, with an idle alpha still in their
    files for a while. Nothing in the folder says which one trained it."""
    alpha = parameters.get("alpha")
    if alpha is None or alpha == rank:
        return
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        _refuse_file(where, f"has alpha = {_short(alpha)}, a positive number is expected")
    early = scale * alpha / rank
    raise AdapterError(
        "QH-C51",
        f"The adapter has rank {rank}, scale {scale:g} and alpha {alpha:g}: its product is multiplied by {early:g} or "
        f"by {scale:g}, depending on the version of mlx-lm that trained it.",
        where=str(where),
        cause="The first versions of mlx-lm multiplied by scale * alpha / rank. Later ones take the scale alone; for a "
        "while they still wrote an alpha that they did not use.",
        fix=f"Remove alpha from lora_parameters; set scale to {early:g} if one of the first versions, which multiplied "
        "by alpha, trained it.",
        context={"scales": [scale, early]},
    )


def _recorded(folder: Path, rank: int, scale: float) -> tuple[float, bool] | None:
    """alpha and rsLoRA as they were before the adapter came into this layout, if they still give its scale."""
    lora = _document(folder).get(LORA)
    if not isinstance(lora, dict):
        return None
    alpha, use_rslora = lora.get("alpha"), lora.get("use_rslora")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isinstance(use_rslora, bool):
        return None
    as_recorded = AdapterConfig(rank, float(alpha), use_rslora=use_rslora)
    return (as_recorded.alpha, use_rslora) if as_recorded.scale == scale else None


def _alpha(scale: float, rank: int) -> float:
    """The alpha whose quotient by the rank is `scale`; where no float is, the nearest (one part in 2**52 off)."""
    product = scale * rank
    candidates = (product, math.nextafter(product, 0.0), math.nextafter(product, math.inf))
    return next((alpha for alpha in candidates if alpha / rank == scale), product)


def _read_tensors(folder: Path) -> safetensors_file.TensorFile:
    path = folder / TENSORS_FILE
    if not os.path.lexists(path):
        whole = sorted(entry.name for entry in folder.glob("model*.safetensors")) if folder.is_dir() else []
        other = "the folder holds a whole model, perhaps a fused one" if whole else "the folder does not have it"
        _refuse_file(path, f"is missing: {other}")
    try:
        found = safetensors_file.read_arrays(path)
    except OSError as problem:
        _refuse_file(path, f"cannot be read ({problem.strerror or problem})", problem)
    lossy = {name: dtype for name, dtype in found.dtypes.items() if dtype not in ("F32", "F16", "BF16")}
    if lossy:
        name, dtype = next(iter(lossy.items()))
        raise AdapterError(
            "QH-C11",
            f"{len(lossy)} tensors cannot become float32 without loss, the first is {name} with {dtype}.",
            where=str(path),
            fix="Save the adapter in float32, float16 or bfloat16.",
            context={"tensors": lossy},
        )
    return found


def _modules_of(tensors: Collection[str], folder: Path) -> tuple[str, ...]:
    halves: dict[str, set[str]] = {}
    foreign = []
    for name in tensors:
        module, _, half = name.rpartition(".")
        if module and half in ("lora_a", "lora_b"):
            halves.setdefault(module, set()).add(half)
        else:
            foreign.append(name)
    single = sorted(module for module, found in halves.items() if len(found) == 1)
    if halves and not foreign and not single:
        return tuple(sorted(halves))
    listed = [*map(ascii, sorted(foreign)), *(f"{module} without its other half" for module in single)]
    raise AdapterError(
        "QH-C09" if halves else "QH-C08",
        f"The adapter's tensors are not those of plain LoRA: of {len(tensors)}, {len(foreign)} are unexpected and "
        f"{len(single)} modules are incomplete; first: {', '.join(listed[:5]) or 'there are none'}.",
        where=str(folder / TENSORS_FILE),
        cause="Names such as <module>.lora_a and .lora_b are expected; <module>.m belongs to DoRA.",
        fix="Take the folder as mlx-lm saved it, trained with fine_tune_type lora.",
        context={"unexpected": sorted(foreign), "incomplete_modules": single},
    )


def _rank_axis(name: str, dimensions: int) -> int:
    """Of a linear layer's A `[in, r]` and B `[r, out]`; of a stack's `[experts, r, in]` and `[experts, out, r]`."""
    is_a = name.endswith("lora_a")
    return int(is_a) if dimensions == 2 else 2 - int(is_a)


def _require_rank(tensors: Mapping[str, safetensors_file.Array], rank: int, folder: Path) -> None:
    wrong = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in sorted(tensors.items())
        if tensor.ndim not in (2, 3) or tensor.shape[_rank_axis(name, tensor.ndim)] != rank
    ]
    if wrong:
        raise AdapterError(
            "QH-C09",
            f"{len(wrong)} of {len(tensors)} tensors are not of rank {rank}, which adapter_config.json states; first: "
            f"{', '.join(wrong[:5])}.",
            where=str(folder / TENSORS_FILE),
            cause="Ranks that differ by module have no plain LoRA counterpart.",
            fix="Take both files from the same adapter.",
            context={"misshapen": wrong},
        )


def _refuse_left_out(
    raw: Mapping[str, object],
    parameters: Mapping[str, object],
    modules: tuple[str, ...],
    linear_modules: Collection[str] | None,
    folder: Path,
) -> None:
    """Tensors that mlx-lm would not load, by what the configuration says of names and layers."""
    try:
        left_out = MlxTargets.read(raw, parameters).left_out(modules, linear_modules)
    except ValueError as problem:
        _refuse_file(folder / CONFIG_FILE, ascii(str(problem))[1:-1], problem)
    if not left_out:
        return
    told = {"num_layers": raw.get("num_layers"), "lora_layers": raw.get("lora_layers"), "keys": parameters.get("keys")}
    settings = ", ".join(f"{name}={_short(value)}" for name, value in told.items() if value is not None)
    raise AdapterError(
        "QH-C09",
        f"{len(left_out)} of {len(modules)} modules have tensors that adapter_config.json leaves out ({settings}); "
        f"first: {', '.join(left_out[:5])}.",
        where=str(folder / CONFIG_FILE),
        cause="mlx-lm would not load these tensors, so that the two files are two different adapters.",
        fix="Take both files from the same adapter.",
        context={"left_out": left_out},
    )


def _read_json(path: Path) -> dict[str, object]:
    try:
        return strict_json.read_object(path)
    except OSError as problem:
        _refuse_file(path, f"cannot be read ({problem.strerror or problem})", problem)
    except strict_json.JsonProblem as problem:
        _refuse_file(path, f"is not valid JSON ({problem})", problem)


def _short(value: object) -> str:
    text = repr(value)
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."


def _refuse_file(path: Path, problem: str, cause: BaseException | None = None) -> NoReturn:
    raise AdapterError(
        "QH-C50",
        f"{path.name} {problem}.",
        where=str(path),
        fix=f"Name a folder with {TENSORS_FILE} and {CONFIG_FILE}, as mlx-lm saves it.",
    ) from cause
