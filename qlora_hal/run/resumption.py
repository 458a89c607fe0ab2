"""From a run's folder to what goes on: its newest state, its settings on the backend that takes it up, and whether all
that it was made from is still the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_hal.adapter.fitting import check_same_settings
from qlora_hal.adapter.targets import asks_for_all
from qlora_hal.checkpoint import latest_state
from qlora_hal.checkpoint.reading import kept_record, unfinished_notes
from qlora_hal.detect import discovery
from qlora_hal.errors import CheckpointError
from qlora_hal.errors.redaction import REMOVED
from qlora_hal.model.source import plan_model
from qlora_hal.model.verifying import base_config_hash
from qlora_hal.report.run_file import given_config
from qlora_hal.run.identity import flat_settings, is_place, require_own
from qlora_hal.run.paths import PathOverrides, with_absolute_paths
from qlora_hal.run.recovery import require_config_unchanged
from qlora_hal.run.transfer import check_allowed, transferred_config

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.hooks import Hooks
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.run.directory import RunDirectory
    from qlora_hal.run.prepare import PreparedRun


def newest_state(directory: RunDirectory, console: RunConsole) -> TrainingState:
    """The newest state that verifies, with notes on what is not in it. Raises CheckpointError QH-C20 when it is another
    run's, or the configuration is not that of the run."""
    with _told_what_the_run_came_to(directory.content):
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


@contextmanager
def _told_what_the_run_came_to(content: Mapping[str, object]) -> Iterator[None]:
    """An error that no checkpoint is left does not call a run unsaved that was, and does not send one away that is
    finished."""
    try:
        yield
    except CheckpointError as error:
        if content.get("steps") and not error.context.get("failures"):
            error.cause = f"The run was saved at step {content['steps']}; its checkpoints were removed since."
            if content.get("status") == "finished":
                error.fix = "Nothing is left to resume: the run is finished, and its adapter can be used as it is."
        raise


def settings_without_secrets(config: Mapping[str, object]) -> list[str]:
    """The settings of a record that it does not hold as they were given: a token, or a secret of the environment, was
    taken out."""

    def texts(value: object) -> list[str]:
        return [value] if isinstance(value, str) else list(map(str, value)) if isinstance(value, list) else []

    return [key for key, value in flat_settings(config) if any(REMOVED in text for text in texts(value))]


def settings_on_backend(
    given: RunConfig, state: TrainingState, backend: str | None, hooks: Hooks, console: RunConsole, *, transfer: bool
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run's configuration for the backend that goes on with it, and what that changes. Raises CheckpointError
    QH-C12 for what is not allowed, or cannot be."""
    name = backend or str(state.provenance["backend"])
    capabilities = discovery.load_spec(discovery.find(name, discovery.listed(hooks.offered_backends()))).capabilities
    config, changes = transferred_config(given, state.provenance, name, capabilities)
    refuse_to_store_anew(state.step, given, changes)
    check_allowed(state.step, changes, transfer=transfer)
    if name != state.provenance["backend"] and config.backend.options != given.backend.options:
        console.note(f"backend.options are those of {state.provenance['backend']}; {name} uses its defaults")
    return config, changes


def refuse_to_store_anew(step: int, config: RunConfig, changes: Sequence[str]) -> None:
    """A base that comes quantized has no other weights to make a format of. Raises CheckpointError QH-C12."""
    change = next((change for change in changes if change.startswith("weight format")), None)
    if change is None:
        return
    named = config.model
    facts = plan_model(named.name_or_path, revision=named.revision, trust_remote_code=named.trust_remote_code).facts
    if facts.prequantized is None:
        return
    stored = facts.prequantized.weight_format
    raise CheckpointError(
        "QH-C12",
        f"Step {step} cannot be resumed there: {change}, and the base comes quantized to {stored}.",
        cause="It holds no 16-bit weights to store in another format, not even with --transfer.",
        fix=f"Resume on a backend that reads {stored}: qlora-hal backends lists them.",
    )


def with_new_paths(record: RunRecord, relocation: PathOverrides, config: RunConfig) -> RunRecord:
    """run.json with the places that were given anew, so that they need not be given again."""
    if relocation == PathOverrides():
        return record
    # Only these: a release that knows more settings than the run began with must not make it another one.
    moved = dict(flat_settings(given_config(with_absolute_paths(config))))
    recorded: dict[str, Any] = {
        key: dict(part) if isinstance(part, dict) else part for key, part in record.config.items()
    }
    for path in filter(is_place, moved.keys() - {"output_dir"}):
        group, *inner = path.split(".")
        recorded[group] = _with_place(recorded[group], inner, moved[path])
    return replace(record, config=recorded)


def _with_place(tree: Any, path: Sequence[str], place: object) -> Any:
    """A tree with another value under a path of names and, in a list, of numbers."""
    if not path:
        return place
    name, *inner = path
    if isinstance(tree, list):
        return [_with_place(one, inner, place) if str(n) == name else one for n, one in enumerate(tree)]
    return {**tree, name: _with_place(tree.get(name), inner, place)}


def with_saved_targets(prepared: PreparedRun, state: TrainingState) -> PreparedRun:
    """`all-linear` means what the loaded model had when the run began; whether it still fits is checked at attach."""
    if not asks_for_all(prepared.config.lora.target_modules):
        return prepared
    resolved_backend = prepared.resolved_backend
    adapter = replace(resolved_backend.adapter, target_modules=state.adapter.config.target_modules)
    return replace(prepared, resolved_backend=replace(resolved_backend, adapter=adapter))


def check_same_run(state: TrainingState, prepared: PreparedRun, changes: Sequence[str]) -> None:
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
    if "token_hashes" in now and "token_hashes" not in differing and "data_fingerprint" in differing:
        differing.remove("data_fingerprint")  # another release prepared the same tokens and masks
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
