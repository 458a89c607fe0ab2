"""The merge from start to end: hear the adapter model, write the candidates, compare, keep the closer or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.adapter.fitting import check_fits
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Float32, LinearShape
from qlora_hal.detect import discovery
from qlora_hal.errors.redaction import redacted
from qlora_hal.export import folder as model_folder
from qlora_hal.export import placing
from qlora_hal.export.comparing import (
    BATCH_ROWS,
    ChosenCompute,
    choose_compute,
    merged_backend,
    opened_merged,
    without_effect,
)
from qlora_hal.export.limits import Limits, derived_limits, require_close
from qlora_hal.export.planning import MergePlan, planned
from qlora_hal.export.recording import record_of, report_rows, shown_name
from qlora_hal.export.reference import Closeness, Reference
from qlora_hal.export.requantizing import opened_requantized, requantized
from qlora_hal.export.request import MergeRequest, MergeResult, check_request
from qlora_hal.export.rounding import DTYPE_BYTES
from qlora_hal.export.weights import BaseFiles, BaseWeight, MergedModel
from qlora_hal.files import atomic_folder, durable, strict_json
from qlora_hal.model.expert_stacks import INTERLEAVED, place_of
from qlora_hal.model.facts import read_facts
from qlora_hal.model.shards import SHARD_BYTES, write_shards
from qlora_hal.model.source import ModelSource
from qlora_hal.model.weight_files import read_headers

if TYPE_CHECKING:
    from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts
    from qlora_hal.report.console import RunConsole

REFERENCE_FILE = "reference.float32"


def carry_out(request: MergeRequest, console: RunConsole, *, shard_bytes: int = SHARD_BYTES) -> MergeResult:
    """Merge and prove, or leave nothing at `request.out`."""
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        console.note(text)

    check_request(request)
    for leftover in placing.check_free(request.out):
        console.note(leftover)
    plan = planned(request, console, note)
    placing.check_space(request.out, _needed_bytes(plan), candidates=len(plan.candidates))
    with placing.staging(request.out) as staging:
        return Merge(plan, staging, console, notes, shard_bytes).carry_out()


_PROJECTIONS = 3
"""Stacks of one block: files hold an expert's projections beside each other, and each view decodes all experts."""


@dataclass(frozen=True, slots=True)
class AdapterModel:
    """What is kept of the adapter model when it is closed."""

    linear_modules: Mapping[str, LinearShape]
    effect: Closeness
    chosen: ChosenCompute
    device: DeviceFacts
    merged_backend: BackendSpec
    merged_compute: Compute


class Merge:
    """One merge inside its staging folder."""

    def __init__(self, plan: MergePlan, staging: Path, console: RunConsole, notes: list[str], shard_bytes: int) -> None:
        self._plan = plan
        self._request = plan.request
        self._adapter = plan.subject.adapter
        self._source = plan.resolved_backend.source
        self._staging = staging
        self._notes = notes
        self._console = console
        self._shard_bytes = shard_bytes
        self._files = BaseFiles(read_headers(self._source.path))
        self._trained_files = BaseFiles(read_headers(plan.trained_base.path))
        self._written: dict[str, dict[str, str]] = {}

    def carry_out(self) -> MergeResult:
        vocabulary, rows = self._source.facts.vocabulary_size, self._plan.rows
        with Reference(
            self._staging / REFERENCE_FILE, rows.positions, lambda: rows.batches(vocabulary, BATCH_ROWS)
        ) as reference:
            model = self._hear(reference)
            if "original" in self._plan.candidates:
                self._write("original", self._source, self._files, model.linear_modules, self._original_weight)
            closeness = {base: self._compared(base, model, reference) for base in self._written}
            base = min(closeness, key=lambda name: closeness[name].kl_mean)
            limits = self._limits(model, reference)
            require_close(
                closeness[base],
                limits,
                base=base,
                dtype=self._request.dtype,
                trained_on_original=self._plan.trained_on_original,
            )
            record = self._record(base, closeness, model, reference, limits)
            if self._request.requantize is not None:
                record["requantized"] = self._requantized(self._request.requantize, base, model, reference)
                record["notes"] = redacted(list(self._notes))
        self._finish(self._staging / base, record)
        return self._result(base, closeness[base], limits, record)

    def _limits(self, model: AdapterModel, reference: Reference) -> Limits:
        return derived_limits(
            spread=reference.spread,
            effect=model.effect,
            linear_modules=model.linear_modules,
            dtype=self._request.dtype,
            compute_dtype=model.chosen.compute.dtype,
            max_kl=self._request.max_kl,
            min_top1=self._request.min_top1,
        )

    def _record(
        self,
        base: str,
        closeness: Mapping[str, Closeness],
        model: AdapterModel,
        reference: Reference,
        limits: Limits,
    ) -> dict[str, object]:
        return record_of(
            self._plan,
            base=base,
            closeness=closeness,
            effect=model.effect,
            spread=reference.spread,
            limits=limits,
            chosen=model.chosen,
            device=model.device,
            merged_on=model.merged_backend.name,
            files=self._written[base],
            notes=self._notes,
        )

    def _result(self, base: str, found: Closeness, limits: Limits, record: Mapping[str, object]) -> MergeResult:
        return MergeResult(
            path=self._request.out,
            base=base,
            dtype=self._request.dtype,
            kl=found.kl_mean,
            top1=found.top1,
            max_kl=limits.max_kl,
            min_top1=limits.min_top1,
            compared_tokens=found.tokens,
            record=record,
            notes=tuple(self._notes),
        )

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._console.note(text)

    def _hear(self, reference: Reference) -> AdapterModel:
        """Open the base as it was trained on, take the adapter model's logits, and write what needs the open base."""
        resolved_backend = self._plan.resolved_backend
        spec = resolved_backend.choice.spec
        trainer = CheckedTrainer(discovery.open_trainer(spec, self._plan.subject.options_on(spec.name)))
        try:
            device = trainer.device_facts()
            proved = trainer.proved_compute_dtypes()
            chosen = choose_compute(self._plan.subject, resolved_backend, proved, device.memory_limit_bytes)
            trainer.load(self._plan.trained_base, resolved_backend.quantization, chosen.compute)
            modules = trainer.linear_modules()
            check_fits(self._adapter, modules, where=str(self._plan.subject.adapter_dir))
            trainer.attach(self._adapter, "adamw")
            reference.record(trainer.logits)
            trainer.attach(without_effect(self._adapter), "adamw")
            effect = reference.closeness(trainer.logits)
            if "dequantized" in self._plan.candidates:
                weight = _dequantized_weight(trainer)
                self._write("dequantized", self._plan.trained_base, self._trained_files, modules, weight)
            other, compute = merged_backend(spec, chosen.compute, self._source.facts.model_type)
            if other is not spec:
                self._note(f"{spec.name} does not load unquantized models; {other.name} runs the merged one")
            return AdapterModel(modules, effect, chosen, trainer.device_facts(), other, compute)
        finally:
            trainer.close()

    def _original_weight(self, module: str) -> Float32:
        if f"{module}.weight" in self._source.facts.tensors:
            return self._files.float32(f"{module}.weight")
        return self._files.stack(module, in_turns=self._source.facts.model_type in INTERLEAVED)

    def _write(
        self,
        base: str,
        source: ModelSource,
        files: BaseFiles,
        modules: Mapping[str, LinearShape],
        weight: BaseWeight,
    ) -> None:
        merged = MergedModel(source.facts, files, self._adapter, modules, weight, self._request.dtype)
        folder = self._staging / base
        folder.mkdir()
        self._written[base] = write_shards(folder, merged.tensors(), merged.value, shard_bytes=self._shard_bytes)
        template = model_folder.chat_template_of(self._plan.subject.config.data.chat_template, self._source.path)
        model_folder.write_configuration(folder, self._source, self._request.dtype, template)

    def _compared(self, base: str, model: AdapterModel, reference: Reference) -> Closeness:
        with opened_merged(
            self._staging / base,
            model.merged_backend,
            model.merged_compute,
            self._adapter,
            trust_remote_code=self._source.trust_remote_code,
        ) as trainer:
            return reference.closeness(trainer.logits)

    def _requantized(
        self, weight_format: str, base: str, model: AdapterModel, reference: Reference
    ) -> dict[str, object]:
        """Write the merged model in another format inside its folder, and compare that as well."""
        merged = self._staging / base
        folder = merged / weight_format
        source = ModelSource(self._request.out.name, merged, read_facts(merged))
        calibration = self._plan.rows.calibration
        made_by = requantized(source, folder, weight_format, calibration=calibration, tell=self._console.note)
        preferred = made_by or self._plan.resolved_backend.choice.spec
        with opened_requantized(folder, preferred, model.chosen.compute.dtype, self._plan.subject) as trainer:
            found = reference.closeness(trainer.logits)
        if not found.kl_mean < model.effect.kl_mean / 2:
            self._note(
                f"the model in {weight_format} is about as far from the adapter model (KL {found.kl_mean:.3g}) as the "
                f"base alone ({model.effect.kl_mean:.3g}): rounding to {weight_format} lost much of what was learnt; "
                "keep the adapter beside the base, or use the merged model as it is"
            )
        return {"format": weight_format, "folder": folder.name, **found.as_json()}

    def _finish(self, folder: Path, record: Mapping[str, object]) -> None:
        card = model_folder.model_card(record, shown_name(self._source.name), report_rows(record))
        durable.write_new(folder / model_folder.RECORD_FILE, [strict_json.encode(record)])
        (folder / model_folder.CARD_FILE).write_text(card, encoding="utf-8")
        atomic_folder.put_in_place(folder, self._request.out)


def _dequantized_weight(trainer: CheckedTrainer) -> BaseWeight:
    stack = lru_cache(maxsize=_PROJECTIONS)(trainer.dequantized_weight)

    def weight(module: str) -> Float32:
        place = place_of(module)
        found = stack(place.module)[place.number] if place is not None else trainer.dequantized_weight(module)
        # A copy: what the view gives may be the very memory of the base.
        return np.array(found, dtype=np.float32)

    return weight


def _needed_bytes(plan: MergePlan) -> int:
    facts = plan.resolved_backend.source.facts
    # Every parameter at the output's width, and per tensor what its header takes.
    model = facts.parameter_count * DTYPE_BYTES[plan.request.dtype] + 200 * len(facts.tensors)
    reference = plan.rows.positions * facts.vocabulary_size * 4
    # At most half of 16 bits, for a 4-bit model with its scales and its unquantized embeddings.
    requantized_model = facts.parameter_count if plan.request.requantize is not None else 0
    return len(plan.candidates) * model + reference + requantized_model
