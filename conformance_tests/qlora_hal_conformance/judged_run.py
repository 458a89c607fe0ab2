"""From a settings file or a run's folder to what of it is judged: the backend, its combination, where results go."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.adapter.targets import require_rank, resolve_targets
from qlora_hal.config.resolve import require_settings, resolve_settings
from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.toolkit import require
from qlora_hal.detect.discovery import listed, reports
from qlora_hal.detect.requirements import needs_calibration, quantization_of, requirements_of
from qlora_hal.detect.selection import Choice, choose
from qlora_hal.errors import BackendContractError
from qlora_hal.hooks import Hooks
from qlora_hal.model.source import resolve_model
from qlora_hal.report.run_file import RUN_FILE, read_run_config, read_run_file
from qlora_hal.run.prepare import check_options
from qlora_hal_conformance.combination import Combination
from qlora_hal_conformance.subject import Reference, import_subject

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import Quantization
    from qlora_hal.model.facts import ModelFacts

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of plain weights in a safetensors header."""


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """`named` is the file or folder as a page may show it; `folder` where the run's own results lie, None where the
    settings name none."""

    named: str
    reference: Reference
    combination: Combination
    folder: Path | None


def judged_run(path: Path, given: Reference | None = None) -> JudgedRun:
    """What `train` would compute with these settings here, or what the run in this folder computed. `given` takes the
    place of the run's backend.

    Raises what `train` raises before it reads data: ConfigError, ModelError, HubError, BackendNotFoundError,
    BackendUnavailableError, UnsupportedFeatureError.
    """
    if path.is_dir() or path.name == RUN_FILE:
        return _of_folder(path if path.is_dir() else path.parent, given)
    config = resolve_settings(path).config
    reference, combination = _resolved(config, given)
    return JudgedRun(path.name, reference, combination, Path(config.output_dir) if config.output_dir else None)


def _of_folder(folder: Path, given: Reference | None) -> JudgedRun:
    """A run that began: what it resolved stands in its record, and `auto` means what it meant there."""
    config, recorded = read_run_config(folder), _part(read_run_file(folder), "resolved")
    if recorded:
        settings: dict[str, Any] = {"backend": {"name": recorded["backend"]}, "quantization": {}}
        in_fp8 = bool(recorded.get("fp8_products"))
        settings["quantization"]["compute_dtype"] = "fp8" if in_fp8 else recorded["compute_dtype"]
        config = config.model_copy(
            update={group: getattr(config, group).model_copy(update=values) for group, values in settings.items()}
        )
    reference, combination = _resolved(config, given)
    return JudgedRun(folder.resolve().name, reference, combination, folder)


def _resolved(config: RunConfig, given: Reference | None) -> tuple[Reference, Combination]:
    require_settings(config, "model.name_or_path")
    model = config.model
    facts = resolve_model(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code).facts
    spec, reference = _backend(config, facts, given)
    quantization = quantization_of(config, facts, spec.capabilities)
    targets = resolve_targets(config.lora.target_modules, facts.linear_modules)
    require_rank(config.lora.r, [facts.linear_modules[name] for name in targets])
    prequantized = facts.prequantized is not None or needs_calibration(facts, quantization, spec.capabilities)
    return reference, _combination(config, facts, quantization, targets, prequantized=prequantized)


def _backend(config: RunConfig, facts: ModelFacts, given: Reference | None) -> tuple[BackendSpec, Reference]:
    """The backend that `train` would take, or the one that is named instead, which must be able to do the run."""
    needs = requirements_of(config, facts)
    if given is not None:
        spec = _named_spec(given)
        require(spec, needs)
        check_options(config, Choice(spec, "named"))
        return spec, given
    hooks = Hooks()
    entries = listed(hooks.offered_backends())
    choice = choose(
        config.backend.name,
        needs,
        entries,
        reports(entries),
        allow_cpu=config.backend.allow_cpu,
        ask_hook=hooks.chosen_backend,
    )
    check_options(config, choice)
    return choice.spec, Reference(backend=choice.spec.name)


def _named_spec(given: Reference) -> BackendSpec:
    """One under development lies where its author runs the suite. Raises BackendContractError QH-B02 where it cannot be
    imported."""
    sys.path.insert(0, os.getcwd())
    try:
        return import_subject(given).spec
    except ImportError as error:
        raise BackendContractError(
            "QH-B02",
            f"{given.spec or given.trainer} cannot be imported: {error}.",
            fix="Name it as --spec package.module:SPEC, in the folder that holds the package.",
        ) from error
    finally:
        sys.path.remove(os.getcwd())


def _combination(
    config: RunConfig, facts: ModelFacts, quantization: Quantization, targets: tuple[str, ...], *, prequantized: bool
) -> Combination:
    lora, training = config.lora, config.training
    kinds = {name.rpartition(".")[2] for name in targets}
    made = Combination(
        weight_format=quantization.weight_format.value,
        dtype=config.quantization.dtype,
        fp8_products=config.quantization.fp8_products,
        family=facts.model_type,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        prequantized=prequantized,
        stored_dtype=_stored_dtype(facts),
        gradient_checkpointing=training.gradient_checkpointing,
        packing=config.data.packing,
        dropout=lora.dropout,
        rank=lora.r,
        alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        target_kinds=tuple(sorted(kinds)),
        optimizer=training.optim,
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        row_length=config.data.max_seq_length,
        options=config.backend.options,
    )
    return replace(
        made,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or None,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
    )


def _stored_dtype(facts: ModelFacts) -> str:
    """What most of the numbers of the plain weights are stored in."""
    sizes: Counter[str] = Counter()
    for tensor in facts.tensors.values():
        if tensor.dtype in STORED:
            sizes[STORED[tensor.dtype]] += tensor.byte_count
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _part(document: Mapping[str, object], key: str) -> Mapping[str, Any]:
    part = document.get(key)
    return part if isinstance(part, dict) else {}
