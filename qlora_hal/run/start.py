"""A new run, or one that goes on: open its folder, prepare it, carry it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.adapter.fitting import check_same_settings
from qlora_hal.adapter.targets import asks_for_all
from qlora_hal.checkpoint import latest_state
from qlora_hal.checkpoint.reading import kept_record, unfinished_notes
from qlora_hal.config.resolve import require_settings
from qlora_hal.contract.dropout import MASKS
from qlora_hal.data.source.in_memory import keep_rows, kept_rows
from qlora_hal.data.source.reading import has_splits
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import find, load_spec
from qlora_hal.errors import CheckpointError, ConfigError
from qlora_hal.files.refused_paths import named_path
from qlora_hal.hooks import Hooks
from qlora_hal.model.source import resolve_model
from qlora_hal.model.verifying import base_config_hash, verify_model
from qlora_hal.processes.signals import Requests, ignored_note, requests_by_signal
from qlora_hal.quantize.calibration import refuse_idle_calibration, with_quantized_base
from qlora_hal.report.console import RunConsole
from qlora_hal.report.run_file import given_config, read_run_config, record_from
from qlora_hal.run.directory import RunDirectory, rehearsed
from qlora_hal.run.finish import print_already_finished, reported_when_finished, result_of_finished
from qlora_hal.run.identity import PLACES, config_hash, flat_settings, require_own
from qlora_hal.run.paths import PathOverrides, require_paths, with_absolute_paths
from qlora_hal.run.prepare import drawn_seed, likely_dtype, prepare_run, resolve_backend
from qlora_hal.run.record import first_record
from qlora_hal.run.recovery import require_config_unchanged
from qlora_hal.run.result import TrainResult
from qlora_hal.run.session import RunContext, execute, window_sampler
from qlora_hal.run.transfer import check_allowed, transferred_config
from qlora_hal.trackers import observers_for

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.config.resolve import ResolvedSettings
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.run.prepare import PreparedRun, Rows


def run_new(
    settings: ResolvedSettings,
    rows: Rows | None,
    observers: Sequence[object],
    *,
    overwrite: bool,
    force_unlock: bool,
    dry_run: bool,
    verify: bool,
    console: RunConsole | None,
) -> TrainResult:
    """Train from the start. `dry_run` ends before the model loads, and leaves nothing behind."""
    with _shown_on(console) as console, requests_by_signal(console.note) as requests:
        return _new_run(
            settings,
            rows,
            observers,
            overwrite=overwrite,
            force_unlock=force_unlock,
            dry_run=dry_run,
            verify=verify,
            console=console,
            requests=requests,
        )


@contextmanager
def _shown_on(console: RunConsole | None) -> Iterator[RunConsole]:
    console = console or RunConsole()
    try:
        yield console
    finally:
        console.close()


def _new_run(
    settings: ResolvedSettings,
    rows: Rows | None,
    observers: Sequence[object],
    *,
    overwrite: bool,
    force_unlock: bool,
    dry_run: bool,
    verify: bool,
    console: RunConsole,
    requests: Requests,
) -> TrainResult:
    require_settings(settings.config, "model.name_or_path", "output_dir", *(["data.path"] if rows is None else []))
    hooks = Hooks([*observers_for(settings.config.training.report_to), *observers], note=console.note)
    config = hooks.ready_config(settings.config)
    recorded = given_config(with_absolute_paths(config))
    if dry_run:
        with rehearsed(config.output_dir, config=recorded, overwrite=overwrite) as scratch:
            return _planned(_prepared(config, rows, hooks, scratch, console, verify=verify))
    if note := ignored_note():
        console.note(note)
    with (
        RunDirectory.open_new(
            config.output_dir, config=recorded, overwrite=overwrite, force_unlock=force_unlock
        ) as directory,
        reported_when_finished(directory),
    ):
        for note in directory.notes:
            console.note(note)
        prepared = _prepared(config, rows, hooks, directory.path, console, verify=verify)
        return _trained(prepared, settings.origins, directory, hooks, console, requests)


def _prepared(
    config: RunConfig, rows: Rows | None, hooks: Hooks, run_dir: Path, console: RunConsole, *, verify: bool
) -> PreparedRun:
    """All that can be found wrong before the model loads, found; rows in memory are kept in `run_dir`."""
    for note in idle_settings(config, has_rows=rows is not None):
        console.note(note)
    resolved_backend = resolve_backend(config, hooks, console)
    refuse_idle_calibration(config, resolved_backend)
    if rows is not None:
        keep_rows(rows, run_dir)
    seed = drawn_seed(config)
    if config.training.seed is None:
        console.note(f"no seed was given; {seed} was drawn")
    prepared = prepare_run(config, seed, resolved_backend, run_dir, rows, console)
    _refuse_endless_warmup(prepared)
    return _with_verified_model(prepared, {}, console) if verify else prepared


def _with_verified_model(prepared: PreparedRun, recorded: Mapping[str, object], console: RunConsole) -> PreparedRun:
    """Every byte of the model hashed, and compared with what the run began with. Raises CheckpointError QH-E15."""
    folder = prepared.resolved_backend.source.origin.path
    return replace(prepared, model_hashes=verify_model(folder, recorded, console.note))


def _trained(
    prepared: PreparedRun,
    origins: Mapping[str, str],
    directory: RunDirectory,
    hooks: Hooks,
    console: RunConsole,
    requests: Requests,
) -> TrainResult:
    prepared = with_quantized_base(prepared, directory.path, console)
    record = first_record(with_absolute_paths(prepared.config), origins, prepared)
    return execute(RunContext(prepared, directory, console, hooks, record, requests))


def run_resumed(
    run_dir: Path,
    *,
    backend: str | None,
    transfer: bool,
    relocation: PathOverrides,
    observers: Sequence[object],
    force_unlock: bool,
    verify: bool,
    trust_remote_code: bool = False,
    console: RunConsole | None,
) -> TrainResult:
    """Go on from the newest checkpoint that verifies, on the backend that saved it or on another."""
    with (
        _shown_on(console) as console,
        requests_by_signal(console.note) as requests,
        RunDirectory.open_existing(run_dir, force_unlock=force_unlock) as directory,
        reported_when_finished(directory),
    ):
        if note := ignored_note():
            console.note(note)
        state = _newest_state(directory, console)
        ended = result_of_finished(directory, record_from(directory.content), state, console.note)
        if ended is not None and relocation == PathOverrides() and not verify:
            # Nothing that it was made from need be there still.
            print_already_finished(ended, console)
            return ended
        given = relocation.applied(read_run_config(directory.path, trust_remote_code=trust_remote_code))
        rows = kept_rows(directory.path)
        require_paths(given, run_dir, reads_data=rows is None)
        record = _relocated(record_from(directory.content), relocation, given)
        hooks = Hooks([*observers_for(given.training.report_to), *observers], note=console.note)
        if given.lora.dropout and state.provenance.get("dropout_masks") != MASKS:
            console.note("an earlier release saved this checkpoint; from here on other dropout masks are drawn")
        config, changes = _carried(given, state, backend, hooks, console, transfer=transfer)
        resolved_backend = resolve_backend(config, hooks, console)
        seed = int(str(state.provenance["seed"]))
        prepared = prepare_run(config, seed, resolved_backend, directory.path, rows, console)
        prepared = with_quantized_base(_with_saved_targets(prepared, state), directory.path, console)
        _check_same_run(state, prepared, changes)
        hashes = record.model.get("files")
        if verify or hashes:
            prepared = _with_verified_model(prepared, hashes if isinstance(hashes, dict) else {}, console)
        if relocation != PathOverrides():  # the places hold what they should, and are remembered
            directory.record({"config": record.config, "config_hash": config_hash(record.config)})
        if ended is not None:
            if prepared.model_hashes:
                directory.record({"model": {**record.model, "files": dict(prepared.model_hashes)}})
            print_already_finished(ended, console)
            return ended
        return execute(RunContext(prepared, directory, console, hooks, record, requests, state, changes))


def _newest_state(directory: RunDirectory, console: RunConsole) -> TrainingState:
    """The newest state that verifies, with notes on what is not in it. Raises CheckpointError QH-C20 when it is another
    run's, or the configuration is not that of the run."""
    state, path, notes = latest_state(directory.path)
    for note in (*directory.notes, *notes):
        console.note(note)
    saved_with = kept_record(path)
    require_config_unchanged(directory.path, directory.content, saved_with)
    unverified = require_own(directory.content, state, saved_with, path)
    for note in (*unverified, *unfinished_notes(state.step, directory.unfinished_saves)):
        console.note(note)
    console.note(f"resumed from step {state.step}")
    return state


def _carried(
    given: RunConfig, state: TrainingState, backend: str | None, hooks: Hooks, console: RunConsole, *, transfer: bool
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run's configuration for the backend that goes on with it, and what that changes. Raises CheckpointError
    QH-C12 for what is not allowed, or cannot be."""
    name = backend or str(state.provenance["backend"])
    capabilities = load_spec(find(name, discovery.listed(hooks.offered_backends()))).capabilities
    config, changes = transferred_config(given, state.provenance, name, capabilities)
    _refuse_to_store_anew(state.step, given, changes)
    check_allowed(state.step, changes, transfer=transfer)
    if name != state.provenance["backend"] and config.backend.options != given.backend.options:
        console.note(f"backend.options are those of {state.provenance['backend']}; {name} uses its defaults")
    return config, changes


def idle_settings(config: RunConfig, *, has_rows: bool) -> Iterator[str]:
    """Notes on settings that this model and these data leave without a meaning; none is passed over in silence."""
    if config.model.revision and named_path(config.model.name_or_path).is_dir():
        yield "model.revision applies only to hub models; a local folder is used unchanged"
    if has_rows and config.data.path:
        yield "data.path is not read: rows were given in memory"
    if config.data.split != "train" and (has_rows or not has_splits(config.data.path)):
        yield "data.split applies only to data with splits; all rows are read"


def _refuse_endless_warmup(prepared: PreparedRun) -> None:
    """A warm-up that is longer than the run would be cut to it. Raises ConfigError QH-U01."""
    training = prepared.config.training
    if not training.warmup_steps:
        return
    steps = window_sampler(prepared).total_steps(training.num_train_epochs, training.max_steps)
    if training.warmup_steps > steps:
        raise ConfigError(
            "QH-U01",
            f"training.warmup_steps is {training.warmup_steps}, and the run has {steps} steps.",
            where="training.warmup_steps",
            cause="The learning rate would never reach the one that is set.",
            fix=f"Set training.warmup_steps to less than {steps}, or train for longer.",
        )


def _relocated(record: RunRecord, relocation: PathOverrides, config: RunConfig) -> RunRecord:
    """run.json with the places that were given anew, so that they need not be given again."""
    if relocation == PathOverrides():
        return record
    # Only these: a release that knows more settings than the run began with must not make it another one.
    moved = dict(flat_settings(given_config(with_absolute_paths(config))))
    recorded: dict[str, Any] = {
        key: dict(part) if isinstance(part, dict) else part for key, part in record.config.items()
    }
    for path in PLACES & moved.keys() - {"output_dir"}:
        group, _, name = path.partition(".")
        recorded[group][name] = moved[path]
    return replace(record, config=recorded)


def _refuse_to_store_anew(step: int, config: RunConfig, changes: Sequence[str]) -> None:
    """A base that comes quantized has no other weights to make a format of. Raises CheckpointError QH-C12."""
    change = next((change for change in changes if change.startswith("weight format")), None)
    if change is None:
        return
    named = config.model
    facts = resolve_model(named.name_or_path, revision=named.revision, trust_remote_code=named.trust_remote_code).facts
    if facts.prequantized is None:
        return
    stored = facts.prequantized.weight_format
    raise CheckpointError(
        "QH-C12",
        f"Step {step} cannot be resumed there: {change}, and the base comes quantized to {stored}.",
        cause="It holds no 16-bit weights to store in another format, not even with --transfer.",
        fix=f"Resume on a backend that reads {stored}: qlora-hal backends lists them.",
    )


def _planned(prepared: PreparedRun) -> TrainResult:
    """What a dry run found out, in the form of a result without a step."""
    resolved_backend, training = prepared.resolved_backend, prepared.config.training
    quantization, memory = resolved_backend.quantization, prepared.estimate
    run_dir = Path(prepared.config.output_dir).expanduser()
    plan = {
        "steps": window_sampler(prepared).total_steps(training.num_train_epochs, training.max_steps),
        "sequences": len(prepared.data.train),
        "sequences_per_step": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "target_modules": len(resolved_backend.adapter.target_modules),
        "compute_dtype": likely_dtype(prepared.config, resolved_backend.choice.spec, resolved_backend.report),
        "memory": {**asdict(memory), "total": memory.total, "high": memory.high},
    }
    return TrainResult(
        backend=resolved_backend.choice.spec.name,
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
        plan=plan,
    )


def _with_saved_targets(prepared: PreparedRun, state: TrainingState) -> PreparedRun:
    """`all-linear` means what the loaded model had when the run began; whether it still fits is checked at attach."""
    if not asks_for_all(prepared.config.lora.target_modules):
        return prepared
    resolved_backend = prepared.resolved_backend
    adapter = replace(resolved_backend.adapter, target_modules=state.adapter.config.target_modules)
    return replace(prepared, resolved_backend=replace(resolved_backend, adapter=adapter))


def _check_same_run(state: TrainingState, prepared: PreparedRun, changes: Sequence[str]) -> None:
    """The adapter's settings, the base, the tokens and, where no change was allowed, the storage are those of the
    checkpoint. Raises AdapterError QH-C06 and CheckpointError, naming what differs."""

    check_same_settings(
        state.adapter.config, prepared.resolved_backend.adapter, where=f"checkpoint of step {state.step}"
    )
    quantization, base = prepared.resolved_backend.quantization, prepared.resolved_backend.source
    now: dict[str, object] = {
        "base_fingerprint": base.origin.facts.fingerprint,
        "tokenizer_hash": prepared.tokenizer.hash,
        "data_fingerprint": prepared.data.fingerprint,
    }
    newer: dict[str, object] = {  # not in a checkpoint of an earlier release
        "base_config_hash": base_config_hash(base.origin.facts.config),
        "token_hashes": dict(prepared.data.hashes),
    }
    now |= {name: value for name, value in newer.items() if name in state.provenance}
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
    # Another tokenizer makes other tokens of the same rows, so it comes before the data.
    codes = {"base_fingerprint": "QH-E15", "base_config_hash": "QH-E15", "tokenizer_hash": "QH-C14"}
    codes |= {"data_fingerprint": "QH-D16", "token_hashes": "QH-D16"}
    raise CheckpointError(
        next((code for name, code in codes.items() if name in differing), "QH-C12"),
        f"This is not the run that the checkpoint of step {state.step} belongs to: {listing}.",
        cause="The base, the data, the tokenizer (or its library) or the storage changed since it was saved.",
        fix="Restore what changed, or start a new run.",
        context={"differing": differing},
    )
