"""Which adapter is meant, and the base it was trained on, stored as it was then: told from run and provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from qlora_hal.adapter.peft_files import CONFIG_FILE, PROVENANCE_FILE, read_provenance
from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import AdapterError, BackendError, ConfigError, UnsupportedFeatureError
from qlora_hal.files.opening import refuse_link
from qlora_hal.formats.catalogue import record_of
from qlora_hal.hooks import Hooks
from qlora_hal.report.run_file import examined_run_file, read_run_file
from qlora_hal.run.adapters import require_own_adapter
from qlora_hal.run.directory import ADAPTER_FOLDER, RUN_FILE
from qlora_hal.run.prepare import resolve_backend

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.prepare import ResolvedBackend

_LEVELS_ABOVE = 2
"""A run's folder is looked for this far above an adapter: `run/adapter`, `run/checkpoints/step-00000100`."""


# the adapter --------------------------------------------------------------------------------------------------------


def adapter_folders(target: Path) -> tuple[Path, Path | None]:
    """(folder of the adapter, folder of its run). Raises AdapterError QH-C61 for a run without a finished adapter,
    QH-C50 for a folder that is neither."""
    if (target / RUN_FILE).is_file() and not (target / CONFIG_FILE).is_file():
        return finished_adapter(target), target
    if not (target / CONFIG_FILE).is_file():
        raise AdapterError(
            "QH-C50",
            f"{target} is neither a run nor an adapter: it has no {RUN_FILE} and no {CONFIG_FILE}.",
            where=str(target),
            fix="Name the folder of a finished run, or one with adapter_model.safetensors and adapter_config.json.",
        )
    above = target.resolve().parents[:_LEVELS_ABOVE]
    around = next((folder for folder in above if (folder / RUN_FILE).is_file()), None)
    return target, around if around is not None and _belongs(target, around) else None


def _belongs(adapter_dir: Path, run_dir: Path) -> bool:
    """Whether a run wrote an adapter that lies in its folder: only one of qlora_hal's, and with the run's id."""
    if not (adapter_dir / PROVENANCE_FILE).is_file():
        return False
    return read_provenance(adapter_dir).get("run_id") == examined_run_file(run_dir)[0].get("run_id")


def finished_adapter(run_dir: Path, *, option: str = "") -> Path:
    """The adapter's folder in a run. Raises AdapterError QH-C61, which names a checkpoint to take in its place, behind
    the `option` that takes one; QH-C22 for the adapter of another run, UnsafeInputError QH-X06 for a link."""
    adapter_dir, record = run_dir / ADAPTER_FOLDER, read_run_file(run_dir)
    refuse_link(adapter_dir)
    if (adapter_dir / CONFIG_FILE).is_file():
        require_own_adapter(adapter_dir, record.get("run_id"))
        return adapter_dir
    status = record.get("status", "unknown")
    saved = [str(path) for _, path in checkpoints(run_dir)]
    or_checkpoint = f", or name one of its checkpoints, such as {option}{quote(saved[-1])}" if saved else ""
    raise AdapterError(
        "QH-C61",
        f"The run {run_dir} has no finished adapter; its status is {status}.",
        where=str(run_dir),
        cause="A run writes its adapter folder when it ends.",
        fix=f"Finish it with qlora-hal resume {quote(str(run_dir))}{or_checkpoint}.",
        context={"status": status, "checkpoints": len(saved)},
    )


# its base -----------------------------------------------------------------------------------------------------------


def trained_config(
    run_config: RunConfig | None,
    provenance: Mapping[str, object],
    storage: Mapping[str, object],
    *,
    model: str | None,
    trust_remote_code: bool,
    where: Path,
) -> RunConfig:
    """A configuration that opens the base again: the model (`model` where it lies now), its `storage`, the run's data
    and backend settings. Raises ConfigError QH-U14 when nothing names the model."""
    base = RunConfig() if run_config is None else run_config
    name = model or base.model.name_or_path or str(provenance.get("base_name") or "")
    if not name:
        raise ConfigError(
            "QH-U14",
            "The adapter does not name its base model.",
            where=str(where),
            fix="Name it: --model NAME_OR_PATH.",
        )
    # A revision is of the repository that training named, not of a `model` given now; its code runs only as pinned.
    recorded = provenance.get("base_revision") if run_config is None else base.model.revision
    settings = {
        **base.model.model_dump(),
        "name_or_path": name,
        "revision": recorded if model is None or trust_remote_code else None,
        "trust_remote_code": trust_remote_code,
    }
    return RunConfig.model_validate(
        {
            "model": settings,
            "quantization": storage,
            "data": base.data.model_dump(),
            "backend": {"name": "auto", "allow_cpu": True, "options": options_of_training(base, provenance)},
        }
    )


def options_of_training(config: RunConfig, provenance: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of the backend that trained: a run that moved has none of those it began with."""
    recorded = provenance.get("backend_options")
    return recorded if isinstance(recorded, Mapping) else config.backend.options


def options_on(config: RunConfig, backend: str, trained_on: str) -> Mapping[str, object]:
    """The options with which `backend` opens the base: they are one backend's own, so another one has none."""
    return config.backend.options if backend == trained_on else {}


def storage_of_training(provenance: Mapping[str, object]) -> dict[str, object] | None:
    """How the base was stored, as settings: the format by its own name, not by a backend's level. None where it is not
    recorded. Raises BackendNotFoundError QH-E82 for a format that is not here."""
    recorded = provenance.get("weight_format")
    if recorded is None:
        return None
    record = record_of(str(recorded))
    return {
        "weight_format": record.name,
        "block_size": provenance.get("block_size"),
        "double_quant": provenance.get("double_quant") if record.double_quant else None,
    }


def backend_of_training(
    config: RunConfig,
    facts: ModelFacts,
    provenance: Mapping[str, object],
    backend: str,
    console: RunConsole,
    note: Callable[[str], None],
) -> ResolvedBackend:
    """The backend named; else the one that trained, where it is ready; else any that serves the format, with a note.
    Products in 8-bit floats are of the training alone, with a note too.

    Raises as `resolve_backend`.
    """
    trained_on, why = str(provenance.get("backend") or ""), ""
    if provenance.get("fp8_products"):
        note("the adapter was trained with products in fp8; here the base is not rounded to 8 bits")
    if facts.prequantized is not None:  # it is taken as it is
        config = config.model_copy(update={"quantization": type(config.quantization)()})
    if backend != "auto":
        return resolve_backend(_on(config, backend, trained_on), Hooks(), console)
    if trained_on:
        try:
            return resolve_backend(_on(config, trained_on, trained_on), Hooks(), console)
        except (BackendError, UnsupportedFeatureError) as error:
            why = error.message
    resolved_backend = resolve_backend(_on(config, "auto", trained_on), Hooks(), console)
    if why:
        there = f"{resolved_backend.choice.spec.name} is used instead"
        note(f"{trained_on}, which trained the adapter, cannot be used here: {why} {there}")
    return resolved_backend


def _on(config: RunConfig, name: str, trained_on: str) -> RunConfig:
    settings: Mapping[str, object] = {
        **config.backend.model_dump(),
        "name": name,
        "options": options_on(config, name, trained_on),
    }
    return config.model_copy(update={"backend": type(config.backend).model_validate(settings)})
