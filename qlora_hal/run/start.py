"""A new run, or one that goes on: open its folder, prepare it, carry it out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.config.resolve import require_settings, revalidated
from qlora_hal.config.schema import ParallelConfig
from qlora_hal.contract.dropout import MASKS
from qlora_hal.contract.world import World
from qlora_hal.data.source.in_memory import GivenRows
from qlora_hal.data.source.reading import blamed_on, has_splits, refuse_absent, validation_files
from qlora_hal.errors import ConfigError, QloraHalError, figures
from qlora_hal.errors.redaction import REMOVED
from qlora_hal.files.refused_paths import named_path
from qlora_hal.hooks import Hooks
from qlora_hal.memory.placement import FULL, NONE, OFFLOAD
from qlora_hal.model.hub import require_space
from qlora_hal.model.verifying import verify_model
from qlora_hal.processes.signals import ignored_note, requests_by_signal
from qlora_hal.quantize.calibration import refuse_calibration_by_ranks, refuse_idle_calibration, with_quantized_base
from qlora_hal.ranks.following import followed_existing, followed_new, silent_console
from qlora_hal.ranks.identity import is_restart, launch_here, may_be_restart, seed_of_ranks, world_here
from qlora_hal.ranks.planning import SHARD, DevicePlan
from qlora_hal.ranks.window_share import sequences_of_one_rank
from qlora_hal.report.console import RunConsole
from qlora_hal.report.run_file import given_config, read_run_config, read_run_file, record_from
from qlora_hal.run.directory import RunDirectory, rehearsed
from qlora_hal.run.finish import print_already_finished, reported_when_finished, result_of_finished
from qlora_hal.run.identity import config_hash
from qlora_hal.run.measured import check_observers
from qlora_hal.run.memory_cap import within_limit
from qlora_hal.run.paths import PathOverrides, require_paths, with_absolute_paths
from qlora_hal.run.planned_memory import likely_dtype
from qlora_hal.run.prepare import (
    drawn_seed,
    planned_model,
    prepare_run,
    resolve_backend,
    window_sampler,
    with_fetched_weights,
)
from qlora_hal.run.record import first_record
from qlora_hal.run.result import TrainResult
from qlora_hal.run.resumption import (
    check_same_run,
    newest_state,
    settings_on_backend,
    settings_without_secrets,
    with_new_paths,
    with_saved_targets,
)
from qlora_hal.run.session import RunContext, carry_out
from qlora_hal.trackers import observers_for

if TYPE_CHECKING:
    from qlora_hal.config.resolve import ResolvedSettings
    from qlora_hal.config.schema import DataConfig, RunConfig
    from qlora_hal.run.prepare import PreparedRun, Rows


def run_new(
    settings: ResolvedSettings,
    rows: Rows | None,
    observers: Sequence[object],
    *,
    validation_rows: Rows | None = None,
    overwrite: bool,
    force_unlock: bool,
    dry_run: bool,
    verify: bool,
    console: RunConsole | None,
    planned_ranks: int = 1,
) -> TrainResult:
    """Train from the start. `dry_run` ends before the model loads, and leaves nothing behind; it plans for
    `planned_ranks` devices."""
    given_rows = GivenRows(rows, validation_rows)
    config, note_on_validation = _with_validation_of_folder(settings.config, given_rows)
    settings = replace(settings, config=config)
    world = World(0, planned_ranks, local_size=planned_ranks) if dry_run and planned_ranks > 1 else world_here()
    output_dir = named_path(settings.config.output_dir)
    if _began_here(output_dir, settings.config, overwrite=overwrite):
        if checkpoints(output_dir):
            return run_resumed(output_dir, observers=observers, verify=verify, console=console)
        overwrite = True
    with _shown_on(console, world) as console, requests_by_signal(console.note) as requests:
        needs_path = rows is None and not settings.config.data.sources
        require_settings(settings.config, "model.name_or_path", "output_dir", *(["data.path"] if needs_path else []))
        if note_on_validation:
            console.note(note_on_validation)
        told = [*observers_for(settings.config.training.report_to), *observers] if world.rank == 0 else []
        hooks = Hooks(told, note=console.note, tells=world.rank == 0)
        config = revalidated(hooks.ready_config(settings.config), "qlora_hal_config_ready")
        check_observers(observers, world, evaluates=_evaluates(config.data, has_rows=given_rows.validation is not None))
        recorded = given_config(with_absolute_paths(config))
        if dry_run:
            with rehearsed(config.output_dir, config=recorded, overwrite=overwrite) as scratch:
                prepared = _prepared(config, settings.given, given_rows, hooks, scratch, console, world)
                for note in _not_fetched(prepared, verify=verify):
                    console.note(note)
                is_here = prepared.resolved_backend.source.remote is None
                return _planned(_with_verified_model(prepared, {}, console) if verify and is_here else prepared)
        with (
            followed_new(recorded)
            if world.rank
            else RunDirectory.open_new(
                config.output_dir,
                config=recorded,
                overwrite=overwrite,
                force_unlock=force_unlock,
                launch=launch_here(),
            ) as directory,
            reported_when_finished(directory),
        ):
            for note in filter(None, (ignored_note(), *directory.notes)):
                console.note(note)
            prepared = _prepared(config, settings.given, given_rows, hooks, directory.path, console, world)
            prepared = with_fetched_weights(prepared, console)
            if verify:
                prepared = _with_verified_model(prepared, {}, console)
            prepared = with_quantized_base(prepared, directory.path, console)
            record = first_record(with_absolute_paths(prepared.config), settings.origins, prepared)
            return carry_out(RunContext(prepared, directory, console, hooks, record, requests))


def _began_here(run_dir: Path, config: RunConfig, *, overwrite: bool) -> bool:
    """Whether the run in this folder is the one that torchrun started before: only that goes on by itself, or gives way
    where it has saved nothing yet. Of several machines only those count a start on which a rank failed; there the same
    settings have to do."""
    if not (is_restart() or (may_be_restart() and not overwrite)):
        return False
    try:
        content = read_run_file(run_dir)
    except QloraHalError:  # an earlier run's, or none: a new one looks at the folder as always
        return False
    return content.get("launch") == launch_here() and (
        is_restart() or content.get("config_hash") == config_hash(given_config(with_absolute_paths(config)))
    )


@contextmanager
def _shown_on(console: RunConsole | None, world: World) -> Iterator[RunConsole]:
    console = silent_console() if world.rank else console or RunConsole()
    try:
        yield console
    finally:
        console.close()


def _prepared(
    config: RunConfig,
    given: Collection[str],
    rows: GivenRows,
    hooks: Hooks,
    run_dir: Path,
    console: RunConsole,
    world: World,
) -> PreparedRun:
    """All that can be found wrong before weights are fetched, or the model loads, found: the cheapest first. Rows in
    memory are kept in `run_dir`."""
    refuse_evaluation_of_nothing(config, rows)
    has_rows, has_validation_rows = rows.train is not None, rows.validation is not None
    for note in idle_settings(
        config, given, has_rows=has_rows, has_validation_rows=has_validation_rows, ranks=world.size
    ):
        console.note(note)
    _refuse_absent_rows(config.data, rows)
    resolved_backend = resolve_backend(config, hooks, console)
    if remote := resolved_backend.source.remote:
        require_space(remote.repository, remote.files)
    if "lora.experts" in given and not resolved_backend.source.facts.has_routed_experts:
        console.note("lora.experts is not used: the model has no routed experts")
    refuse_idle_calibration(config, resolved_backend)
    refuse_calibration_by_ranks(config, resolved_backend, world)
    rows.keep(run_dir)
    seed = drawn_seed(config) if world.size == 1 else seed_of_ranks(config.training.seed)
    if config.training.seed is None:
        console.note(f"no seed was given; {seed} was drawn")
    prepared = prepare_run(
        config, seed, resolved_backend, run_dir, rows.train, console, validation_rows=rows.validation, world=world
    )
    _refuse_endless_warmup(prepared)
    prepared = _within_memory_limit(prepared, console)
    for note in (*_late_evaluations(prepared, given), *memory_notes(prepared)):
        console.note(note)
    return prepared


def _within_memory_limit(prepared: PreparedRun, console: RunConsole) -> PreparedRun:
    """Raises ConfigError QH-U81 where the run cannot keep to `training.memory_limit`."""
    config, resolved = prepared.settled_config, prepared.resolved_backend
    share = prepared.world.size if prepared.mode == SHARD else 1
    planned = planned_model(config, resolved, prepared.world, share)
    prepared, note = within_limit(prepared, planned)
    if note:
        console.note(note)
    return prepared


def _refuse_absent_rows(data: DataConfig, rows: GivenRows) -> None:
    """What a look at the disk tells of the rows, before anything is fetched. Raises DataError (QH-D50, QH-D51)."""
    named = []
    if rows.train is None:
        named += [(f"data.sources[{number}].path", source.path) for number, source in enumerate(data.sources)]
        named.append(("data.path", data.path))
    if rows.validation is None:
        named.append(("data.validation_path", data.validation_path or ""))
    for setting, path in named:
        if path:
            with blamed_on(setting):
                refuse_absent(path)


def _not_fetched(prepared: PreparedRun, *, verify: bool) -> Iterator[str]:
    """What a dry run leaves to the run: the weights that lie on the hub."""
    remote = prepared.resolved_backend.source.remote
    if remote is None:
        return
    yield f"{figures.size(remote.missing_bytes)} of weights lie on the hub; the run fetches them"
    if verify:
        yield "--verify hashes nothing in this dry run: the weights are not on this machine"


def _with_verified_model(prepared: PreparedRun, recorded: Mapping[str, object], console: RunConsole) -> PreparedRun:
    """Every byte of the model hashed, and compared with what the run began with. Raises CheckpointError QH-E15."""
    folder = prepared.resolved_backend.source.origin.path
    return replace(prepared, model_hashes=verify_model(folder, recorded, console.note))


def run_resumed(
    run_dir: Path,
    *,
    backend: str | None = None,
    transfer: bool = False,
    relocation: PathOverrides | None = None,
    observers: Sequence[object] = (),
    force_unlock: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    console: RunConsole | None = None,
) -> TrainResult:
    """Go on from the newest checkpoint that verifies, on the backend that saved it or on another."""
    world, relocation = world_here(), relocation or PathOverrides()
    with (
        _shown_on(console, world) as console,
        requests_by_signal(console.note) as requests,
        _existing(run_dir, world, force_unlock=force_unlock) as (directory, read_from),
        reported_when_finished(directory),
    ):
        if note := ignored_note():
            console.note(note)
        state = newest_state(read_from, console)
        ended = result_of_finished(directory, record_from(directory.content), state, console.note)
        if ended is not None and relocation == PathOverrides() and not verify:
            # Nothing that it was made from need be there still.
            if backend is not None and backend != state.provenance["backend"]:
                console.note(f"{backend} is not used: the run has ended on {state.provenance['backend']}")
            print_already_finished(ended, console)
            return ended
        given = relocation.applied(read_run_config(read_from.path, trust_remote_code=trust_remote_code))
        rows = GivenRows.kept(read_from.path)
        if without := settings_without_secrets(given_config(given)):
            console.note(
                f"{', '.join(without)}: what looked like a secret is not in run.json, and {REMOVED} stands in its place"
            )
        require_paths(given, run_dir, reads_data=rows.train is None)
        record = with_new_paths(record_from(directory.content), relocation, given)
        told = [*observers_for(given.training.report_to), *observers] if world.rank == 0 else []
        hooks = Hooks(told, note=console.note, tells=world.rank == 0)
        check_observers(observers, world, evaluates=_evaluates(given.data, has_rows=rows.validation is not None))
        if given.lora.dropout and state.provenance.get("dropout_masks") != MASKS:
            console.note("an earlier release saved this checkpoint; from here on other dropout masks are drawn")
        config, changes = settings_on_backend(given, state, backend, hooks, console, transfer=transfer)
        resolved_backend = resolve_backend(config, hooks, console)
        seed = int(str(state.provenance["seed"]))
        refuse_calibration_by_ranks(config, resolved_backend, world)
        sequences = state.provenance.get("sequences_per_step")
        prepared = prepare_run(
            config,
            seed,
            resolved_backend,
            directory.path,
            rows.train,
            console,
            validation_rows=rows.validation,
            world=world,
            sequences_per_step=sequences if isinstance(sequences, int) else sequences_of_one_rank(given.training),
        )
        prepared = with_fetched_weights(with_saved_targets(prepared, state), console)
        prepared = with_quantized_base(prepared, directory.path, console)
        check_same_run(state, prepared, changes)
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
        return carry_out(RunContext(prepared, directory, console, hooks, record, requests, state, changes))


@contextmanager
def _existing(run_dir: Path, world: World, *, force_unlock: bool) -> Iterator[tuple[RunDirectory, RunDirectory]]:
    """The folder that this rank writes into, and the one that the run is read from."""
    if world.rank:
        with followed_existing(run_dir) as both:
            yield both
    else:
        with RunDirectory.open_existing(run_dir, force_unlock=force_unlock) as directory:
            yield directory, directory


_OF_EVALUATION = ("training.per_device_eval_batch_size", "training.load_best_adapter_at_end")


def refuse_evaluation_of_nothing(config: RunConfig, rows: GivenRows) -> None:
    """Raises ConfigError QH-U01 where evaluations are asked for, and there are no rows to evaluate on."""
    if config.training.eval_steps and not _evaluates(config.data, has_rows=rows.validation is not None):
        raise ConfigError(
            "QH-U01",
            f"training.eval_steps is {config.training.eval_steps}, and there are no validation rows.",
            where="training.eval_steps",
            fix="Set data.validation_path or data.validation_fraction, or remove training.eval_steps.",
        )


def _evaluates(data: DataConfig, *, has_rows: bool) -> bool:
    """Whether there are validation rows: in memory (`has_rows`), or by the settings."""
    return has_rows or bool(data.validation_path or data.validation_fraction)


def _with_validation_of_folder(config: RunConfig, rows: GivenRows) -> tuple[RunConfig, str]:
    """The configuration with data.validation_path set where the folder of data.path holds validation rows beside the
    training rows, as mlx-lm's do, and nothing else is said of them; and the note that says so."""
    data = config.data
    if rows.train is not None or rows.validation is not None or not data.path or data.split != "train":
        return config, ""
    files = "" if _evaluates(data, has_rows=False) else validation_files(data.path)
    if not files:
        return config, ""
    update = {"data": data.model_copy(update={"validation_path": data.path})}
    return config.model_copy(update=update), (
        f"data.validation_path is {data.path}, too: {files} there holds validation rows; name the training file itself "
        "in data.path to train without them"
    )


def idle_settings(
    config: RunConfig,
    given: Collection[str] = (),
    *,
    has_rows: bool,
    has_validation_rows: bool = False,
    ranks: int = 1,
) -> Iterator[str]:
    """Notes on settings that this model, these data and the other settings leave without a meaning; none is passed over
    in silence. `given` are the dotted keys that have no default's value."""
    training, data = config.training, config.data
    if training.max_steps and "training.num_train_epochs" in given:
        yield "training.num_train_epochs is not used: training.max_steps says how long the run is"
    if training.warmup_steps is not None and "training.warmup_ratio" in given:
        yield "training.warmup_ratio is not used: training.warmup_steps says how long the warm-up is"
    agreeing = (FULL, OFFLOAD) if training.gradient_checkpointing else (NONE,)
    if "training.gradient_checkpointing" in given and training.recompute not in (None, *agreeing):
        yield "training.gradient_checkpointing is not used: training.recompute says what is computed again"
    if not _evaluates(data, has_rows=has_validation_rows):
        for name in filter(given.__contains__, _OF_EVALUATION):
            yield f"{name} is not used: without data.validation_path or data.validation_fraction nothing is evaluated"
    if config.model.revision and named_path(config.model.name_or_path).is_dir():
        yield "model.revision applies only to hub models; a local folder is used unchanged"
    if has_rows:
        for name in (name for name in ("path", "sources") if getattr(data, name)):
            yield f"data.{name} is not read: rows were given in memory"
    if has_validation_rows:
        for name in (name for name in ("validation_path", "validation_fraction") if getattr(data, name)):
            yield f"data.{name} is not used: validation rows were given in memory"
    if ranks == 1:
        yield from (
            f"parallel.{name} does nothing on one device"
            for name in ParallelConfig.model_fields
            if getattr(config.parallel, name) != getattr(ParallelConfig(), name)
        )
    if data.split != "train" and (has_rows or not has_splits(data.path)):
        yield "data.split applies only to data with splits; all rows are read"
    for number, source in enumerate(() if has_rows else data.sources):
        if source.split != "train" and not has_splits(source.path):
            yield f"data.sources[{number}].split applies only to data with splits; all rows are read"


def _late_evaluations(prepared: PreparedRun, given: Collection[str]) -> Iterator[str]:
    training = prepared.config.training
    if training.eval_steps is None or "training.eval_steps" not in given:
        return
    steps = window_sampler(prepared).total_steps(training.num_train_epochs, training.max_steps)
    during, patience = (steps - 1) // training.eval_steps, training.early_stopping_patience
    if not during:
        yield (
            f"training.eval_steps is {training.eval_steps}, and the run ends with step {steps}: it is evaluated only "
            "before and after"
        )
    if patience is not None and patience > during:
        yield (
            f"training.early_stopping_patience is {patience}, and evaluations on the way of this run number {during}: "
            "it cannot stop early"
        )


def memory_notes(prepared: PreparedRun) -> Iterator[str]:
    """Whether the estimated peak is above what the device has; a run of shorter rows may fit all the same."""
    planned = planned_model(prepared.config, prepared.resolved_backend, prepared.world)
    has, peak = planned.memory_bytes, prepared.estimate.total
    if has and peak > has:
        yield (
            f"the estimated peak of {figures.size(peak)} is above the {figures.size(has)} of memory here; it is "
            "reached by batches as long as data.max_seq_length allows: lower that or "
            "training.per_device_train_batch_size"
        )


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


def _planned(prepared: PreparedRun) -> TrainResult:
    """What a dry run found out, in the form of a result without a step."""
    resolved_backend, training = prepared.resolved_backend, prepared.config.training
    dtype = likely_dtype(prepared.config, resolved_backend.choice.spec, resolved_backend.report)
    memory, size = prepared.estimate, prepared.world.size
    per_host = prepared.world.most_on_host
    devices = DevicePlan(size, per_host, prepared.mode, prepared.why_mode, prepared.sequences_per_step, memory)
    plan = {
        "steps": window_sampler(prepared).total_steps(training.num_train_epochs, training.max_steps),
        "sequences": len(prepared.data.train),
        "sequences_per_step": prepared.sequences_per_step,
        "target_modules": len(resolved_backend.adapter.target_modules),
        "compute_dtype": dtype,
        "fp8_products": prepared.config.quantization.fp8_products,
        "memory": {**asdict(memory), "total": memory.total, "high": memory.high},
        **devices.as_json(),
    }
    return TrainResult.planned(prepared, plan)
