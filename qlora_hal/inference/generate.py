"""Answers of a base and of its adapter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.adapter.fitting import check_base, check_fits
from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.peft_files import CONFIG_FILE, read_adapter, read_provenance, unvouched_note
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.backend import Compute
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.data import ChatTokenizer
from qlora_hal.detect import discovery
from qlora_hal.errors import ConfigError
from qlora_hal.files.refused_paths import named_path
from qlora_hal.formats.record import LEVELS
from qlora_hal.hooks import Hooks
from qlora_hal.inference.loaded_model import LoadedModel
from qlora_hal.model.source import resolve_model
from qlora_hal.quantize.calibration import base_of_run
from qlora_hal.report.console import RunConsole
from qlora_hal.report.run_file import read_run_config, read_run_file
from qlora_hal.run.directory import RUN_FILE
from qlora_hal.run.prepare import resolve_backend
from qlora_hal.run.samples import PLAIN_NOTE, Messages, room_for_an_answer, trained_on_plain_text
from qlora_hal.run.trained_base import (
    adapter_folders,
    backend_of_training,
    finished_adapter,
    options_on,
    storage_of_training,
    trained_config,
)

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.values import ComputeDtype


def open_generation(
    *,
    run_dir: Path | None = None,
    adapter_dir: Path | None = None,
    model: str | None = None,
    backend: str = "auto",
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    console: RunConsole | None = None,
    prompts: Sequence[str | Messages] = (),
) -> LoadedModel:
    """Open a run's adapter, or any adapter beside a model, on the base as it was stored in training.

    `backend` "auto" is the backend that trained, where it is here. `prompts` are those that are known already: one that
    leaves no position for an answer is refused before the model is loaded. Raises ConfigError (QH-U19 among others),
    AdapterError QH-C61 (the run has no finished adapter), QH-C22 (it was changed, or is another run's), QH-C05, QH-C08.
    """
    console = console or RunConsole(quiet=True)
    trained = _trained(run_dir, adapter_dir, model, trust_remote_code)
    config, provenance = trained.config, trained.provenance
    adapter = read_adapter(trained.adapter_dir)
    if unverified := unvouched_note(trained.adapter_dir):
        console.note(unverified)
    named = config.model
    facts = resolve_model(named.name_or_path, revision=named.revision, trust_remote_code=named.trust_remote_code).facts
    if mismatch := check_base(provenance, facts, allow_mismatch=allow_base_mismatch):
        console.note(mismatch)
    if facts.prequantized is None and storage_of_training(provenance) is None:
        console.note("the adapter does not record how its base was stored in training; it is opened in 4 bits")
    resolved_backend = backend_of_training(config, facts, provenance, backend, console, console.note)
    tokenizer = ChatTokenizer.from_folder(
        resolved_backend.source.path,
        chat_template=config.data.chat_template,
        model_vocabulary_size=facts.vocabulary_size or None,
    )
    is_plain = trained.run_dir is not None and trained_on_plain_text(read_run_file(trained.run_dir))
    for prompt in prompts:
        room_for_an_answer(tokenizer, prompt, facts.max_position_embeddings, plain=is_plain)
    source = base_of_run(resolved_backend, trained.run_dir)
    spec = resolved_backend.choice.spec
    options = options_on(config, spec.name, str(provenance.get("backend") or ""))
    trainer = CheckedTrainer(discovery.open_trainer(spec, options))
    try:
        dtype = _dtype(provenance, spec.name, trainer.proved_compute_dtypes(), console)
        trainer.load(source, resolved_backend.quantization, Compute(dtype=dtype, options=options))
        check_fits(adapter, trainer.linear_modules(), where=str(trained.adapter_dir))
        trainer.attach(adapter, "adamw")
    except BaseException:
        trainer.close()
        raise
    if is_plain:
        console.note(PLAIN_NOTE)
    return LoadedModel(trainer, tokenizer, source.facts.max_position_embeddings, plain=is_plain)


def open_any(
    target: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    weight_format: str | None = None,
    backend: str = "auto",
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    console: RunConsole | None = None,
) -> LoadedModel:
    """Open what is there: a run, an adapter (with its base, or `model`), else a model, be it a folder or a hub id.

    Raises as `open_generation` and `open_base`, and ConfigError QH-U42 for an option that means nothing there.
    """
    folder = named_path(target)
    is_adapter = (folder / CONFIG_FILE).is_file()
    if not (is_adapter or (folder / RUN_FILE).is_file()):
        _refuse_idle(target, "a model", {"model": model, "allow_base_mismatch": allow_base_mismatch})
        named = {"name_or_path": str(target), "revision": revision, "trust_remote_code": trust_remote_code}
        return open_base(named, weight_format=weight_format or "auto", backend=backend, console=console)
    _refuse_idle(target, "opened as it was trained", {"weight_format": weight_format, "revision": revision})
    adapter_dir, run_dir = adapter_folders(folder)
    if run_dir is None and model is None:
        raise ConfigError(
            "QH-U14",
            f"{target} is an adapter without its run: its base model has to be named.",
            where=str(target),
            fix="Name it: load(adapter, model=NAME_OR_PATH).",
        )
    return open_generation(
        run_dir=run_dir,
        adapter_dir=adapter_dir,
        model=model,
        backend=backend,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
        console=console,
    )


def open_base(
    named: Mapping[str, object], *, weight_format: str, backend: str, console: RunConsole | None = None
) -> LoadedModel:
    """Open a model without an adapter, a base or a merged one; `named` as in the settings' group `model`. The
    `weight_format` auto is how its files have it. Raises as `resolve_settings`, `resolve_model` and `resolve_backend`.
    """
    console = console or RunConsole(quiet=True)
    chosen = {"model": named, "backend": {"name": backend, "allow_cpu": True}, "weight_format": weight_format, "r": 1}
    config = resolve_settings(None, keywords=chosen, environ={}).config
    facts = resolve_model(**config.model.model_dump()).facts
    if weight_format == "auto" and facts.prequantized is None:
        unchanged = type(config.quantization)(weight_format=LEVELS[0])
        config = config.model_copy(update={"quantization": unchanged})
    resolved_backend = resolve_backend(config, Hooks(), console)
    tokenizer = ChatTokenizer.from_folder(
        resolved_backend.source.path, model_vocabulary_size=facts.vocabulary_size or None
    )
    trainer = CheckedTrainer(discovery.open_trainer(resolved_backend.choice.spec, {}))
    try:
        dtype: ComputeDtype = trainer.proved_compute_dtypes()[0]  # type: ignore[assignment]
        trainer.load(resolved_backend.source, resolved_backend.quantization, Compute(dtype=dtype))
        # Only a model with an adapter answers, by the contract; one of zeros changes nothing.
        trainer.attach(initial_adapter(resolved_backend.adapter, trainer.linear_modules(), seed=0), "adamw")
    except BaseException:
        trainer.close()
        raise
    return LoadedModel(trainer, tokenizer, facts.max_position_embeddings, has_adapter=False)


def _refuse_idle(target: str | Path, what: str, options: Mapping[str, object]) -> None:
    """Raises ConfigError QH-U42 for what was given and has no meaning there."""
    for name in (name for name, value in options.items() if value):
        raise ConfigError(
            "QH-U42",
            f"{name} means nothing here: {target} is {what}.",
            where=name,
            fix=f"Leave {name} out.",
        )


@dataclass(frozen=True, slots=True)
class _Trained:
    """An adapter, what it records of its training, and a configuration that opens its base again."""

    adapter_dir: Path
    run_dir: Path | None
    provenance: Mapping[str, object]
    config: RunConfig


def _trained(run_dir: Path | None, adapter_dir: Path | None, model: str | None, trust_remote_code: bool) -> _Trained:
    if run_dir is None and (adapter_dir is None or model is None):
        raise ConfigError(
            "QH-U14",
            "Neither a run folder nor an adapter with its model was given.",
            fix="Name a run folder (--run runs/a), or --adapter DIR and --model NAME.",
        )
    if adapter_dir is not None:
        adapter_dir, around = adapter_folders(adapter_dir)
        run_dir = run_dir or around
    run_config = (
        None if run_dir is None else read_run_config(run_dir, trust_remote_code=trust_remote_code or model is not None)
    )
    if adapter_dir is None:
        assert run_dir is not None
        adapter_dir = finished_adapter(run_dir, option="--adapter ")
    provenance = read_provenance(adapter_dir)
    storage = storage_of_training(provenance)
    config = trained_config(
        run_config, provenance, storage or {}, model=model, trust_remote_code=trust_remote_code, where=adapter_dir
    )
    # Of the data settings only the template matters to an answer: packing, say, need not be offered here.
    template = type(config.data)(chat_template=config.data.chat_template)
    return _Trained(adapter_dir, run_dir, provenance, config.model_copy(update={"data": template}))


def _dtype(provenance: Mapping[str, object], backend: str, proved: Sequence[str], console: RunConsole) -> ComputeDtype:
    """That of the training on the backend that trained, where the device proves it; else the best of the device."""
    trained = str(provenance.get("compute_dtype") or "auto")
    if backend != provenance.get("backend"):
        return proved[0]  # type: ignore[return-value]
    if trained not in ("auto", *proved):
        console.note(f"trained in {trained}, which this device does not support; {proved[0]} is used")
    return trained if trained in proved else proved[0]  # type: ignore[return-value]
