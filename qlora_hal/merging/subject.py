"""Which adapter is merged, and the base it was trained on, told from a run's folder or from an adapter's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qlora_hal.adapter.peft_files import CONFIG_FILE, PROVENANCE_FILE, TENSORS_FILE, read_adapter, read_provenance
from qlora_hal.errors import AdapterError, ConfigError
from qlora_hal.run_directory import ADAPTER_FOLDER, RUN_FILE
from qlora_hal.values import Adapter

if TYPE_CHECKING:
    from qlora_hal.config import RunConfig
    from qlora_hal.merging.request import MergeRequest

_LEVELS_ABOVE = 2
"""A run's folder is looked for this far above an adapter: `run/adapter`, `run/checkpoints/step-00000100`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter and how its base was stored in training.

    `config` holds only what concerns a merge: model, storage of the base, backend, data. `run_dir` is None for an
    adapter that lies in no run.
    """

    adapter: Adapter
    adapter_dir: Path
    adapter_sha256: str
    provenance: Mapping[str, object]
    config: RunConfig
    run_dir: Path | None
    recorded_backend: str
    trained_dtype: str
    seed: int


def read_subject(request: MergeRequest) -> Subject:
    """Read adapter, provenance and run. Raises AdapterError (QH-C61 no finished adapter, and as `read_adapter`),
    ConfigError (QH-C62 the storage of the base is unknown, QH-S50, QH-U14)."""
    adapter_dir, run_dir = _folders(request.target.expanduser())
    adapter, provenance = read_adapter(adapter_dir), read_provenance(adapter_dir)
    run_config, seed = _run_settings(run_dir)
    return Subject(
        adapter=adapter,
        adapter_dir=adapter_dir,
        adapter_sha256=hashlib.sha256((adapter_dir / TENSORS_FILE).read_bytes()).hexdigest(),
        provenance=provenance,
        config=_merge_config(request, provenance, run_config),
        run_dir=run_dir,
        recorded_backend=str(provenance.get("backend") or ""),
        trained_dtype=str(provenance.get("compute_dtype") or "auto"),
        seed=seed,
    )


def _folders(target: Path) -> tuple[Path, Path | None]:
    """(folder of the adapter, folder of its run)."""
    if (target / RUN_FILE).is_file() and not (target / CONFIG_FILE).is_file():
        adapter_dir = target / ADAPTER_FOLDER
        if not (adapter_dir / CONFIG_FILE).is_file():
            raise _unfinished(target)
        return adapter_dir, target
    if not (target / CONFIG_FILE).is_file():
        raise AdapterError(
            "QH-C50",
            f"{target} is neither a run nor an adapter: it has no {RUN_FILE} and no {CONFIG_FILE}.",
            where=str(target),
            fix="Name the folder of a finished run, or one with adapter_model.safetensors and adapter_config.json.",
        )
    above = target.resolve().parents[:_LEVELS_ABOVE]
    # Only an adapter that qlora_hal wrote belongs to a run around it.
    own = (target / PROVENANCE_FILE).is_file()
    return target, next((folder for folder in above if own and (folder / RUN_FILE).is_file()), None)


def _unfinished(run_dir: Path) -> AdapterError:
    from qlora_hal.checkpoint.reading import checkpoints
    from qlora_hal.report.run_file import read_run_file

    status = read_run_file(run_dir).get("status", "unknown")
    saved = [str(path) for _, path in checkpoints(run_dir)]
    or_checkpoint = f", or name one of its checkpoints, such as {saved[-1]}" if saved else ""
    return AdapterError(
        "QH-C61",
        f"The run {run_dir} has no finished adapter; its status is {status}.",
        where=str(run_dir),
        cause="A run writes its adapter folder when it ends.",
        fix=f"Finish it with qlora-hal resume {run_dir}{or_checkpoint}.",
        context={"status": status, "checkpoints": len(saved)},
    )


def _run_settings(run_dir: Path | None) -> tuple[RunConfig | None, int]:
    """The run's own configuration and the seed it resolved to, which decides the held-out rows."""
    if run_dir is None:
        return None, 0
    from qlora_hal.report.run_file import read_run_config, read_run_file

    resolved = read_run_file(run_dir).get("resolved")
    seed = resolved.get("seed") if isinstance(resolved, Mapping) else None
    return read_run_config(run_dir), seed if isinstance(seed, int) else 0


def _merge_config(request: MergeRequest, provenance: Mapping[str, object], run_config: RunConfig | None) -> RunConfig:
    """The base exactly as it was stored in training: the format by its own name, not by a backend's level."""
    from qlora_hal.config import RunConfig

    base = RunConfig() if run_config is None else run_config
    name = request.model or base.model.name_or_path or str(provenance.get("base_name") or "")
    if not name:
        raise ConfigError(
            "QH-U14",
            "The adapter does not name its base model.",
            where=str(request.target),
            fix="Name it: --model NAME_OR_PATH.",
        )
    model = {**base.model.model_dump(), "name_or_path": name}
    if request.model is not None:
        model |= {"revision": None, "trust_remote_code": False}
    elif run_config is None and provenance.get("base_revision"):
        model["revision"] = provenance["base_revision"]
    return RunConfig.model_validate(
        {
            "model": model,
            "quantization": _storage(request, provenance),
            "data": base.data.model_dump(),
            "backend": {**base.backend.model_dump(), "name": "auto", "allow_cpu": True},
        }
    )


def _storage(request: MergeRequest, provenance: Mapping[str, object]) -> dict[str, object]:
    recorded = provenance.get("weight_format")
    recorded = None if recorded is None else str(recorded)
    if recorded is not None and request.weight_format not in (None, recorded):
        raise ConfigError(
            "QH-C62",
            f"weight_format is {request.weight_format}, but the adapter was trained on a base stored as {recorded}.",
            where="weight_format",
            fix="Leave weight_format out; to merge into the unquantized base, set base to original.",
        )
    if recorded is not None:
        nested = provenance.get("double_quant") if recorded in ("nf4", "fp4") else None
        return {
            "weight_format": _as_setting(recorded),
            "block_size": provenance.get("block_size"),
            "double_quant": nested,
        }
    return {"weight_format": request.weight_format or "auto", "double_quant": request.double_quant}


def _as_setting(weight_format: str) -> str:
    """A format by its own name; by its level where settings have no name for it, which the same backend resolves."""
    from qlora_hal.config import QuantizationConfig
    from qlora_hal.needs import STORED_AT_LEVEL

    if weight_format in get_args(QuantizationConfig.model_fields["weight_format"].annotation):
        return weight_format
    return next((level for level, formats in STORED_AT_LEVEL.items() if weight_format in formats), "auto")


def require_known_storage(subject: Subject, request: MergeRequest, *, prequantized: bool) -> None:
    """Raises ConfigError QH-C62 when nothing says how the base was stored in training: a wrong guess would merge into
    another base than the trained one, and look well."""
    if prequantized or subject.provenance.get("weight_format") or request.weight_format:
        return
    raise ConfigError(
        "QH-C62",
        "The adapter does not record how its base was stored in training.",
        where=str(subject.adapter_dir),
        cause="An adapter trained on 4-bit weights corrects for their rounding; on the original weights it is another "
        "model.",
        fix="Say it: --weight-format none for plain LoRA, --weight-format nf4 (and --double-quant) for QLoRA.",
    )
