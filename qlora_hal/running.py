"""A new run, or one that goes on: open its folder, prepare it, carry it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.errors import CheckpointError
from qlora_hal.observing import TrainResult

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.config import RunConfig
    from qlora_hal.model.source import ModelSource
    from qlora_hal.preparation import PreparedRun, Rows
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.settings import ResolvedSettings

ROWS_FILE = "rows.jsonl"


def run_new(
    settings: ResolvedSettings,
    rows: Rows | None,
    observers: Sequence[object],
    *,
    overwrite: bool,
    force_unlock: bool,
    dry_run: bool,
    console: RunConsole | None,
) -> TrainResult:
    """Train from the start. `dry_run` ends before the model loads."""
    from qlora_hal.execution import Stage, execute
    from qlora_hal.hooks import Hooks
    from qlora_hal.observers import observers_for
    from qlora_hal.preparation import choose_machinery, drawn_seed, prepare_run, require_settings
    from qlora_hal.quantizing import refuse_idle_calibration, with_quantized_base
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import given_config
    from qlora_hal.run_directory import RunDirectory

    console = console or RunConsole()
    require_settings(settings.config, has_rows=rows is not None)
    hooks = Hooks([*observers_for(settings.config.training.report_to), *observers], note=console.note)
    config = hooks.ready_config(settings.config)
    try:
        with RunDirectory.open_new(
            config.output_dir, config=given_config(config), overwrite=overwrite, force_unlock=force_unlock
        ) as directory:
            for note in directory.notes:
                console.note(note)
            machinery = choose_machinery(config, hooks, console)
            refuse_idle_calibration(config, machinery)
            if rows is not None:
                _keep_rows(rows, directory.path)
            seed = drawn_seed(config)
            if config.training.seed is None:
                console.note(f"no seed was given; {seed} was drawn")
            prepared = prepare_run(config, seed, machinery, directory.path, rows, console)
            if dry_run:
                return _planned(prepared, directory.path)
            prepared = with_quantized_base(prepared, directory.path, console)
            record = _first_record(config, settings.origins, prepared)
            return execute(Stage(prepared, directory, console, hooks, record))
    finally:
        console.close()


def run_resumed(
    run_dir: Path,
    *,
    backend: str | None,
    transfer: bool,
    model: str | None,
    data: str | None,
    observers: Sequence[object],
    force_unlock: bool,
    console: RunConsole | None,
) -> TrainResult:
    """Go on from the newest checkpoint that verifies, on the backend that saved it or on another."""
    from qlora_hal.checkpoint import latest_valid_checkpoint, load_checkpoint
    from qlora_hal.checkpoint.reading import unfinished_notes
    from qlora_hal.discovery import find, listed, load_spec
    from qlora_hal.execution import Stage, execute
    from qlora_hal.hand_over import carried_config, check_allowed
    from qlora_hal.hooks import Hooks
    from qlora_hal.observers import observers_for
    from qlora_hal.preparation import choose_machinery, prepare_run
    from qlora_hal.quantizing import with_quantized_base
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import read_run_config, record_from
    from qlora_hal.run_directory import RunDirectory

    console = console or RunConsole()
    try:
        with RunDirectory.open_existing(run_dir, force_unlock=force_unlock) as directory:
            path, notes = latest_valid_checkpoint(directory.path)
            state = load_checkpoint(path)
            for note in (*directory.notes, *notes, *unfinished_notes(state.step, directory.unfinished_saves)):
                console.note(note)
            console.note(f"resumed from step {state.step}")
            record = record_from(directory.content)
            given = _found_again(read_run_config(directory.path), model, data)
            hooks = Hooks([*observers_for(given.training.report_to), *observers], note=console.note)
            name = backend or str(state.provenance["backend"])
            capabilities = load_spec(find(name, listed(hooks.offered_backends()))).capabilities
            config, changes = carried_config(given, state.provenance, name, capabilities)
            check_allowed(state.step, changes, transfer=transfer)
            machinery = choose_machinery(config, hooks, console)
            seed = int(str(state.provenance["seed"]))
            prepared = prepare_run(config, seed, machinery, directory.path, stored_rows(directory.path), console)
            prepared = with_quantized_base(prepared, directory.path, console)
            _check_same_run(state, prepared, changes)
            return execute(Stage(prepared, directory, console, hooks, record, state, changes))
    finally:
        console.close()


def _first_record(config: RunConfig, origins: Mapping[str, str], prepared: PreparedRun) -> RunRecord:
    from qlora_hal.report.run_file import Detection, RunRecord, given_config

    machinery, facts = prepared.machinery, prepared.machinery.source.origin.facts
    choice = machinery.choice
    return RunRecord(
        config=given_config(config),
        origins=origins,
        model={
            "name": machinery.source.name,
            "revision": machinery.source.revision,
            "architecture": facts.architecture,
            "parameter_count": facts.parameter_count,
            "fingerprint": facts.fingerprint,
            "target_modules": list(machinery.adapter.target_modules),
            **_quantized_for_the_run(machinery.source),
        },
        versions=next(r.versions for r in machinery.reports if r.backend == choice.spec.name),
        detection=Detection.of(choice.spec.name, choice.reason, machinery.reports, choice.rejections),
        data_report={"lines": prepared.data.report.lines(), **prepared.data.report.as_json()},
        environment=_environment(),
        memory_estimate={**asdict(prepared.estimate), "total": prepared.estimate.total},
    )


def _quantized_for_the_run(source: ModelSource) -> dict[str, object]:
    """Where the base lies that was quantized for this run, so that the trained model can be opened again."""
    if source.made_from is None:
        return {}
    return {"quantized": {"folder": str(source.path), "fingerprint": source.facts.fingerprint}}


def _environment() -> dict[str, object]:
    import platform

    from qlora_hal import __version__
    from qlora_hal.hardware import inventory

    machine = inventory()
    return {
        "qlora_hal": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.cpu.name,
        "cores": machine.cpu.logical_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [gpu.name for gpu in machine.gpus],
    }


def _planned(prepared: PreparedRun, run_dir: Path) -> TrainResult:
    quantization = prepared.machinery.quantization
    return TrainResult(
        backend=prepared.machinery.choice.spec.name,
        device="",
        weight_format=quantization.weight_format.value,
        block_size=quantization.block_size,
        run_dir=run_dir,
        adapter_dir=run_dir / "adapter",
        steps=0,
        tokens=0,
        losses=(),
        eval_loss_before=None,
        eval_loss_after=None,
        wall_seconds=0.0,
        peak_memory_bytes=None,
        stopped_because="dry run",
    )


def _found_again(config: RunConfig, model: str | None, data: str | None) -> RunConfig:
    """The configuration with the places of model and data on this machine; that they are the same is checked later."""
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": model})})
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
    return config


def _keep_rows(rows: Rows, run_dir: Path) -> None:
    """Rows given in memory, written beside the run so that it can be resumed."""
    import json

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run_dir / ROWS_FILE).write_text(text, encoding="utf-8")


def stored_rows(run_dir: Path) -> Rows | None:
    """Rows that were given in memory were kept beside the run; the data file is read again otherwise."""
    import json

    path = run_dir / ROWS_FILE
    if not path.exists():
        return None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _check_same_run(state: TrainingState, prepared: PreparedRun, changes: Sequence[str]) -> None:
    """The base, the tokens and, where no change was allowed, the storage are those of the checkpoint. Raises
    CheckpointError naming what differs."""
    quantization, base = prepared.machinery.quantization, prepared.machinery.source
    now: dict[str, object] = {
        "base_fingerprint": base.origin.facts.fingerprint,
        "tokenizer_hash": prepared.tokenizer.hash,
        "data_fingerprint": prepared.data.fingerprint,
    }
    if not changes:
        now |= {
            "weight_format": quantization.weight_format.value,
            "block_size": quantization.block_size,
            "double_quant": quantization.double_quant,
        }
        if base.made_from is not None:
            now["quantized_fingerprint"] = base.facts.fingerprint
    differing = [name for name, value in now.items() if state.provenance.get(name) != value]
    if not differing:
        return
    listing = "; ".join(f"{name} was {state.provenance.get(name)}, is {now[name]}" for name in differing)
    code = "QH-C05" if "base_fingerprint" in differing else "QH-D16" if "data_fingerprint" in differing else "QH-C12"
    raise CheckpointError(
        code,
        f"This is not the run that the checkpoint of step {state.step} belongs to: {listing}.",
        cause="The base, the data, the tokenizer or the storage changed since it was saved.",
        fix="Restore what changed, or start a new run.",
        context={"differing": differing},
    )
