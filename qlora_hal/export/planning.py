"""Everything of a merge that can be known, and refused, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.adapter.fitting import check_base
from qlora_hal.adapter.peft_files import unvouched_note
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.data import ChatTokenizer
from qlora_hal.errors import ConfigError
from qlora_hal.export.requantizing import calibrating_backend
from qlora_hal.export.request import MergeRequest
from qlora_hal.export.rows import NO_OTHERS_NOTE, HeldOutRows, held_out_rows
from qlora_hal.export.subject import Subject, read_subject, require_known_storage
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import resolve_model
from qlora_hal.quantize.calibration import base_of_run
from qlora_hal.run.trained_base import backend_of_training

if TYPE_CHECKING:
    from qlora_hal.model.source import ModelSource
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.prepare import ResolvedBackend


@dataclass(frozen=True, slots=True)
class MergePlan:
    """`trained_base` is the folder that was trained on: the model's own, or what was quantized out of it for the run.
    `candidates` are the bases to merge into and compare, of `dequantized` and `original`."""

    request: MergeRequest
    subject: Subject
    resolved_backend: ResolvedBackend
    trained_base: ModelSource
    rows: HeldOutRows
    candidates: tuple[str, ...]

    @property
    def trained_on_original(self) -> bool:
        return self.resolved_backend.quantization.weight_format is WeightFormat.NONE


def planned(request: MergeRequest, console: RunConsole, note: Callable[[str], None]) -> MergePlan:
    """Read adapter and base, choose the backend, prepare the rows. Raises the errors of the rooms it asks."""
    subject = read_subject(request)
    if unverified := unvouched_note(subject.adapter_dir):
        note(unverified)
    model = subject.config.model
    source = resolve_model(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    require_known_storage(subject, request, prequantized=source.facts.prequantized is not None)
    mismatch = check_base(
        subject.provenance, source.facts, allow_mismatch=request.allow_base_mismatch, name=source.name
    )
    if mismatch:
        note(mismatch)
    resolved_backend = backend_of_training(
        subject.config, source.facts, subject.provenance, request.backend, console, note
    )
    wanted = record_of(request.requantize) if request.requantize is not None else None
    calibrated = wanted.weight_format if wanted is not None and wanted.calibrated else None
    if calibrated is not None:
        calibrating_backend(calibrated)  # refused now, not after the merge
    trained_base = base_of_run(resolved_backend, subject.run_dir)
    candidates = _candidates(request.base, resolved_backend)
    if stored := source.facts.prequantized:
        note(f"the base is stored as {stored.weight_format}; the merged model no longer is, it is in {request.dtype}")
    tokenizer = ChatTokenizer.from_folder(
        source.path,
        chat_template=subject.config.data.chat_template,
        model_vocabulary_size=source.facts.vocabulary_size or None,
    )
    rows = held_out_rows(request, subject, tokenizer, source.facts)
    if rows.note:
        note(rows.note)
    if calibrated is not None and not len(rows.others):
        note(NO_OTHERS_NOTE)
    return MergePlan(request, subject, resolved_backend, trained_base, rows, candidates)


def _candidates(base: str, resolved_backend: ResolvedBackend) -> tuple[str, ...]:
    if resolved_backend.quantization.weight_format is WeightFormat.NONE:
        return ("original",)
    if resolved_backend.source.facts.prequantized is None:
        return ("dequantized", "original") if base == "auto" else (base,)
    if base != "original":
        return ("dequantized",)
    raise ConfigError(
        "QH-C62",
        f"base is original, but {resolved_backend.source.name} is stored as "
        f"{resolved_backend.quantization.weight_format.value}: "
        "its folder holds no other weights.",
        where="base",
        fix="Merge into the dequantized weights (--base dequantized): they are the ones that were trained on.",
    )
