"""Which adapter is merged, and the base it was trained on, told from a run's folder or from an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.adapter.peft_files import TENSORS_FILE, read_adapter, read_provenance
from qlora_hal.contract.values import Adapter
from qlora_hal.errors import ConfigError
from qlora_hal.files import durable
from qlora_hal.files.refused_paths import named_path
from qlora_hal.formats.catalogue import record_of
from qlora_hal.report.run_file import read_run_config, read_run_file
from qlora_hal.run.trained_base import adapter_folders, options_on, storage_of_training, trained_config

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.export.request import MergeRequest


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

    def options_on(self, backend: str) -> Mapping[str, object]:
        """The options with which `backend` opens this base."""
        return options_on(self.config, backend, self.recorded_backend)


def read_subject(request: MergeRequest) -> Subject:
    """Read adapter, provenance and run. Raises AdapterError (QH-C61 no finished adapter, and as `read_adapter`),
    ConfigError (QH-C62 the storage of the base is unknown, QH-S50, QH-U14)."""
    adapter_dir, run_dir = adapter_folders(named_path(request.target))
    adapter, provenance = read_adapter(adapter_dir), read_provenance(adapter_dir)
    run_config, seed = _run_settings(run_dir, request.trust_remote_code or request.model is not None)
    return Subject(
        adapter=adapter,
        adapter_dir=adapter_dir,
        adapter_sha256=durable.hashed(adapter_dir / TENSORS_FILE).sha256,
        provenance=provenance,
        config=trained_config(
            run_config,
            provenance,
            _storage(request, provenance),
            model=request.model,
            trust_remote_code=request.trust_remote_code,
            where=request.target,
        ),
        run_dir=run_dir,
        recorded_backend=str(provenance.get("backend") or ""),
        trained_dtype=str(provenance.get("compute_dtype") or "auto"),
        seed=seed,
    )


def _run_settings(run_dir: Path | None, trust_remote_code: bool) -> tuple[RunConfig | None, int]:
    """The run's own configuration and the seed it resolved to, which decides the held-out rows."""
    if run_dir is None:
        return None, 0

    resolved = read_run_file(run_dir).get("resolved")
    seed = resolved.get("seed") if isinstance(resolved, Mapping) else None
    return read_run_config(run_dir, trust_remote_code=trust_remote_code), seed if isinstance(seed, int) else 0


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
    settings = storage_of_training(provenance)
    if settings is None:
        return {"weight_format": request.weight_format or "auto", "double_quant": request.double_quant}
    if request.double_quant is None:
        return settings
    nested = settings["double_quant"]
    if nested is None and record_of(str(recorded)).double_quant:
        return {**settings, "double_quant": request.double_quant}
    if request.double_quant is not bool(nested):
        raise ConfigError(
            "QH-C62",
            f"double_quant is {str(request.double_quant).lower()}, but the adapter was trained on a base stored as "
            f"{recorded} {'with' if nested else 'without'} double quantization.",
            where="double_quant",
            fix="Leave double_quant out: the adapter records how its base was stored.",
        )
    return settings


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
        fix="Specify it: --weight-format none for plain LoRA, --weight-format nf4 (and --double-quant) for QLoRA.",
    )
