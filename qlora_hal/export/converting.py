"""An adapter from PEFT's layout to mlx-lm's or back: the same numbers under the other tool's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from qlora_hal.adapter import mlx_files
from qlora_hal.adapter.fitting import check_base, check_fits
from qlora_hal.adapter.mlx_reading import read_mlx_adapter, read_mlx_provenance
from qlora_hal.adapter.mlx_targets import layers_of
from qlora_hal.adapter.peft_files import read_adapter, read_provenance, write_adapter
from qlora_hal.contract.values import Adapter
from qlora_hal.errors import AdapterError, ConfigError, QloraHalError, StorageError
from qlora_hal.files import strict_json
from qlora_hal.model.source import plan_model
from qlora_hal.report.run_file import read_run_config
from qlora_hal.run.directory import ADAPTER_FOLDER, RUN_FILE
from qlora_hal.run.trained_base import finished_adapter

if TYPE_CHECKING:
    from qlora_hal.model.source import ModelSource

Layout = Literal["peft", "mlx"]

SAME_NAMES = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"})
"""Model types whose modules have one name in Hugging Face and in mlx-lm, compared by running both."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: the adapter's `config`, its folder, and what the user should know."""

    adapter: Adapter
    source: Path
    out: Path
    layout: Layout
    base_name: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        config = self.adapter.config
        return {
            "source": str(self.source),
            "out": str(self.out),
            "layout": self.layout,
            "base": self.base_name,
            "r": config.r,
            "alpha": config.alpha,
            "scale": config.scale,
            "dropout": config.dropout,
            "use_rslora": config.use_rslora,
            "modules": len(config.target_modules),
            "layers": layers_of(config.target_modules),
            "tensors": len(self.adapter.tensors),
            "notes": list(self.notes),
        }


def convert_adapter(source: Path, out: Path, *, to: Layout, model: ModelSource | None = None) -> Conversion:
    """Write the adapter in `source` (its folder, or a run's) as the new folder `out` in the other layout.

    With `model`, names and shapes are checked against it, and module names are written in their short form where that
    is exact; of a run its own base is taken where that can be read. Raises AdapterError as `read_adapter`,
    `read_mlx_adapter` and `check_fits` do, QH-C61 for a run without a finished adapter, QH-C65 for modules that mlx-lm
    names differently; ConfigError QH-U53 when `source` is in that layout already; StorageError QH-S14 when `out` is
    there, QH-S09, QH-S11, QH-S12.
    """
    folder = _adapter_folder(source)
    found = _layout_of(folder)
    if found == to:
        _refuse_same(folder, to)
    if os.path.lexists(out):
        raise StorageError(
            "QH-S14",
            f"{out} already exists; a new folder is expected.",
            where=str(out),
            fix="Name another folder; nothing was written.",
        )
    unread = ""
    if model is None and os.path.lexists(source / RUN_FILE):
        model, unread = _base_of_run(source)
    linear_modules = model.facts.linear_modules if model else None
    adapter = read_adapter(folder) if found == "peft" else read_mlx_adapter(folder, linear_modules)
    mlx_files.require_placeable(adapter.config.target_modules, "target_modules")
    provenance = dict(read_provenance(folder) if found == "peft" else read_mlx_provenance(folder))
    notes = [*_fit_notes(adapter, provenance, model, folder, unread), *_layer_notes(adapter, model)]
    base_name = model.name if model else str(provenance.get("base_name") or "")
    revision = model.revision if model else provenance.get("base_revision")
    if not base_name:
        notes.append("The adapter does not name its base; name it with --model to have it written down.")
    write = write_adapter if to == "peft" else mlx_files.write_mlx_adapter
    write(
        out,
        adapter,
        base_name=base_name,
        base_revision=str(revision) if revision else None,
        provenance=provenance,
        linear_modules=linear_modules,
    )
    return Conversion(adapter, folder, out, to, base_name, tuple(notes))


def _adapter_folder(source: Path) -> Path:
    """A run's folder stands for the adapter in it. Raises AdapterError QH-C61 for a run that has none yet."""
    if os.path.lexists(source / mlx_files.CONFIG_FILE):
        return source
    if os.path.lexists(source / RUN_FILE):
        return finished_adapter(source)
    inside = source / ADAPTER_FOLDER
    return inside if os.path.lexists(inside / mlx_files.CONFIG_FILE) else source


def _base_of_run(run: Path) -> tuple[ModelSource | None, str]:
    """What a run was trained on, from headers alone; or why it cannot be read."""
    named = read_run_config(run, trust_remote_code=True).model  # whose code is not run here
    try:
        return plan_model(
            named.name_or_path, revision=named.revision, trust_remote_code=named.trust_remote_code, tokenizer=False
        ), ""
    except QloraHalError as problem:
        return None, f"The base of the run, {named.name_or_path}, cannot be read here ({problem.code}). "


def _layout_of(folder: Path) -> Layout:
    """Both tools call their file adapter_config.json; its keys tell them apart."""
    path = folder / mlx_files.CONFIG_FILE
    try:
        config = strict_json.read_object(path)
    except OSError as problem:
        _refuse_folder(path, f"cannot be read ({problem.strerror or problem})", problem)
    except strict_json.JsonProblem as problem:
        _refuse_folder(path, f"is not valid JSON ({problem})", problem)
    if "peft_type" in config:
        return "peft"
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "mlx"
    _refuse_folder(path, "has neither peft_type nor lora_parameters")


def _fit_notes(
    adapter: Adapter, provenance: Mapping[str, object], model: ModelSource | None, folder: Path, unread: str = ""
) -> list[str]:
    if model is None:
        return [f"{unread}Names and shapes were not compared with a model; --model BASE does it."]
    check_fits(adapter, model.facts.linear_modules, where=str(folder))
    # Another copy of the base (MLX's 4-bit one, say) is no mistake here: nothing is computed with it.
    base_note = check_base(provenance, model.facts, allow_mismatch=True, name=model.name)
    notes = [base_note] if base_note else []
    if model.facts.model_type not in SAME_NAMES:
        notes.append(
            f"Module names of {model.facts.model_type or 'this architecture'} were not compared between Hugging Face "
            "and mlx-lm; where they differ, the other tool refuses the adapter when it opens it."
        )
    return notes


def _layer_notes(adapter: Adapter, model: ModelSource | None) -> list[str]:
    """mlx-lm trains the last 16 layers unless told otherwise; whoever moves an adapter may not know."""
    layers = layers_of(adapter.config.target_modules)
    known = layers_of(model.facts.linear_modules) if model else list(range(layers[-1] + 1))
    absent = sorted(set(known) - set(layers))
    if not absent:
        return []
    total = f" of {len(known)}" if model else ""
    return [
        f"The adapter covers {len(layers)}{total} layers, {_ranges(layers)}; layers {_ranges(absent)} have none. It is "
        "written for exactly these modules."
    ]


def _ranges(numbers: list[int]) -> str:
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _refuse_same(folder: Path, layout: Layout) -> NoReturn:
    other = "mlx" if layout == "peft" else "peft"
    raise ConfigError(
        "QH-U53",
        f"The adapter is in the {layout} layout already.",
        where=str(folder),
        fix=f"Use it unchanged, or convert it with --to {other}.",
    )


def _refuse_folder(path: Path, problem: str, cause: BaseException | None = None) -> NoReturn:
    raise AdapterError(
        "QH-C50",
        f"{path.name} {problem}.",
        where=str(path),
        fix="Name a run's folder, or a folder with adapter_config.json next to adapter_model.safetensors (PEFT) or "
        "adapters.safetensors (mlx-lm).",
    ) from cause
