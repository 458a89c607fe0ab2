"""Adapters on disk in mlx-lm's layout, written without MLX; `mlx_reading` reads them.

`adapters.safetensors` holds `<module>.lora_a` `[in, r]` and `.lora_b` `[r, out]`, the transposes of PEFT's A and B;
`adapter_config.json` says where they go. mlx-lm multiplies the product by `scale` as it stands, so for it
scale = alpha / r, or alpha / sqrt(r) with rsLoRA. Source: mlx-lm 0.32.2, `tuner/utils.py` and `tuner/lora.py`.
`qlora_hal.json` keeps what mlx-lm has no place for, so that a way there and back changes nothing, and the hash of the
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from qlora_hal.adapter.as_written import vouched
from qlora_hal.adapter.mlx_experts import mlx_path
from qlora_hal.adapter.mlx_targets import place_of
from qlora_hal.adapter.naming import module_of
from qlora_hal.adapter.peft_experts import INTERLEAVED, LAYOUT
from qlora_hal.contract.values import Adapter, AdapterConfig, Float32
from qlora_hal.errors import AdapterError, StorageError
from qlora_hal.files import durable, safetensors_file, strict_json

TENSORS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
PROVENANCE_FILE = "qlora_hal.json"
CARD_FILE = "README.md"
LORA = "lora"
"""The key of `qlora_hal.json` for what mlx-lm's scale alone does not tell."""

_EVERY_LAYER = -1


def write_mlx_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    base_name: str,
    base_revision: str | None,
    provenance: Mapping[str, object],
    linear_modules: Collection[str] | None = None,
) -> None:
    """Write a new folder that `mlx_lm.load(base, adapter_path=folder)` opens; byte-identical for equal input.

    With `linear_modules` (all of the model's), modules are given as `num_layers` and names within a layer where that is
    exact; otherwise by their full paths, which mlx-lm takes as well. Raises AdapterError QH-C65 for modules that
    mlx-lm cannot place, StorageError QH-S14 (the folder is there already), QH-S09, QH-S11, QH-S12.
    """
    tensors, mlx_config = _tensors_and_config(adapter, base_name, provenance, linear_modules)
    if os.path.lexists(folder):
        raise StorageError(
            "QH-S14", f"{folder} already exists; a new folder is expected.", where=str(folder), fix="Name another."
        )
    staging = folder.with_name(f".staging-{folder.name}-{durable.unique_name()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        written = durable.write_new(staging / TENSORS_FILE, safetensors_file.file_chunks(tensors, {"format": "mlx"}))
        durable.write_new(staging / CONFIG_FILE, [strict_json.encode(mlx_config)])
        facts = {**provenance, "base_name": base_name, "base_revision": base_revision, LORA: _lora(adapter.config)}
        durable.write_new(staging / PROVENANCE_FILE, [strict_json.encode(vouched(facts, written, adapter.config))])
        durable.write_new(staging / CARD_FILE, [_CARD.encode("utf-8")])
        durable.flush_folder(staging)
        staging.rename(folder)
        durable.flush_folder(folder.parent)
    except OSError as problem:
        raise durable.storage_error(problem, folder, what="the adapter") from problem
    finally:
        with suppress(OSError):
            durable.remove_tree(staging)


def _tensors_and_config(
    adapter: Adapter, base_name: str, provenance: Mapping[str, object], linear_modules: Collection[str] | None
) -> tuple[dict[str, Float32], dict[str, object]]:
    config = adapter.config
    require_placeable(config.target_modules, "target_modules")
    path = _unchanged if provenance.get(LAYOUT) == INTERLEAVED else mlx_path
    tensors = {
        f"{path(module)}.lora_{half.lower()}": transposed(tensor)
        for (module, half), tensor in ((module_of(key), tensor) for key, tensor in adapter.tensors.items())
    }
    targets = [path(module) for module in config.target_modules]
    num_layers, keys = _placing(targets, linear_modules and [path(module) for module in linear_modules])
    parameters = {"rank": config.r, "scale": config.scale, "dropout": config.dropout, "keys": keys}
    return tensors, {
        "fine_tune_type": "lora",
        "lora_parameters": parameters,
        "model": base_name,
        "num_layers": num_layers,
    }


def _lora(config: AdapterConfig) -> dict[str, object]:
    return {"alpha": config.alpha, "r": config.r, "use_rslora": config.use_rslora}


def _unchanged(module: str) -> str:
    """gpt-oss has the hub's names in mlx-lm too."""
    return module


_CARD = """---
library_name: mlx
pipeline_tag: text-generation
tags: [lora, qlora, qlora_hal]
---

# LoRA adapter

In mlx-lm's layout; `adapter_config.json` names its base. Open it with mlx-lm:

```sh
mlx_lm.generate --model BASE --adapter-path THIS_FOLDER --prompt "..."
```
"""


def _placing(targets: Collection[str], linear_modules: Collection[str] | None) -> tuple[int, list[str]]:
    """(`num_layers`, `keys`): the last layers and names within them where they mean exactly `targets`, else paths."""
    places = {module: place for module in linear_modules or () if (place := place_of(module))}
    if places and set(targets) <= set(places):
        first = min(places[module][0] for module in targets)
        names = {places[module][1] for module in targets}
        reached = {module for module, (layer, name) in places.items() if layer >= first and name in names}
        if reached == set(targets):
            return 1 + max(layer for layer, _ in places.values()) - first, sorted(names)
    return _EVERY_LAYER, sorted(targets)


def require_placeable(modules: Collection[str], where: str) -> None:
    foreign = sorted(module for module in modules if place_of(module) is None)
    if foreign:
        raise AdapterError(
            "QH-C65",
            f"{len(foreign)} of {len(modules)} modules have no known counterpart in the other layout, the first is "
            f"{foreign[0]!a}; paths such as model.layers.0.self_attn.q_proj are expected.",
            where=where,
            cause="Outside model.layers Hugging Face and mlx-lm name modules differently.",
            fix="Train an adapter on the linear layers of model.layers.",
            context={"modules": foreign},
        )


def transposed(tensor: safetensors_file.Array) -> Float32:
    # A transposed view would be written with the bytes of the original.
    """A or B of one library as the other keeps it: of a linear layer transposed, of a stack of experts the same."""
    return np.ascontiguousarray((tensor if tensor.ndim == 3 else tensor.T).astype(np.float32, copy=False))
