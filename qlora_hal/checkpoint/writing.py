"""Saving a checkpoint so that any later crash leaves it, or the one before it, whole.

Order: all files into a staging folder, each flushed; the manifest last; the folder flushed; one rename; the parent
flushed. Only then is the step saved, and only after that are older ones removed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from qlora_hal.adapter.peft_files import TENSORS_FILE, write_adapter_files
from qlora_hal.checkpoint.faults import fault_point
from qlora_hal.checkpoint.manifest import (
    MANIFEST_FILE,
    BrokenCheckpoint,
    ForeignSchema,
    encode_manifest,
    is_complete,
    is_sound,
    read_manifest,
)
from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.checkpoint.state import (
    ANSWERS_FILE,
    CORRUPT,
    OPTIMIZER_FILE,
    PRUNING,
    RECORD_FILE,
    REPLACED,
    STAGING,
    STATE_FILE,
    TrainingState,
    checkpoints_folder,
    optimizer_arrays,
    state_document,
    step_name,
)
from qlora_hal.errors import CheckpointError, ConfigError
from qlora_hal.files import durable, safetensors_file, strict_json

LATEST_LINK = "latest"


def save_checkpoint(
    run_dir: Path,
    state: TrainingState,
    *,
    keep: int,
    protect: Collection[int] = (),
    record: Mapping[str, object] | None = None,
) -> Path:
    """Save a step durably, then remove older ones down to `keep` (at least 2) sound ones, never a step in `protect`,
    nor one of another run. `record` is what run.json holds; the checkpoint keeps a copy, to write it again from.

    Returns the checkpoint's folder. A step saved before is replaced, with its old folder valid until the new one is.
    Removal of older ones is tried again at the next save when it fails; it never fails a save that succeeded.
    Raises StorageError (QH-S09 no space, QH-S11, QH-S12, QH-S14) with older checkpoints untouched, CheckpointError
    QH-C52 when the state cannot be written as JSON, ConfigError QH-S54 for `keep` below 2.
    """
    if keep < 2:
        raise ConfigError(
            "QH-S54", f"checkpoint.save_total_limit is {keep}, at least 2 is expected.", fix="Set it to 2."
        )
    parent = checkpoints_folder(run_dir)
    state_bytes = _state_bytes(state)
    record_bytes = None if record is None else strict_json.encode(record)
    staging = parent / f"{STAGING}{state.step}-{durable.unique_name()}"
    try:
        _make_durable_folder(parent)
        fault_point("ckpt.before_first_write")
        staging.mkdir()
        _write_files(staging, state, state_bytes, record_bytes)
        final = _commit(staging, parent / step_name(state.step), _run_of(state.provenance))
    except OSError as problem:
        raise durable.storage_error(
            problem,
            parent,
            what=f"step {state.step}",
            needed_bytes=_needed_bytes(state),
            safe=_safe_step(run_dir),
            resumable=bool(checkpoints(run_dir)),
        ) from problem
    finally:
        with suppress(OSError):
            durable.remove_tree(staging)
    _point_latest(run_dir, final)
    fault_point("ckpt.before_prune")
    _prune(run_dir, state, keep=keep, protect=protect)
    fault_point("ckpt.after_prune")
    return final


def expected_checkpoint_bytes(adapter_parameters: int) -> int:
    """About the size of a checkpoint: float32 adapter and two float32 AdamW moments."""
    return 3 * 4 * adapter_parameters


def _write_files(staging: Path, state: TrainingState, state_bytes: bytes, record_bytes: bytes | None) -> None:
    written = write_adapter_files(
        staging,
        state.adapter,
        base_name=str(state.provenance.get("base_name") or ""),
        base_revision=_text_or_none(state.provenance.get("base_revision")),
        provenance=state.provenance,
        midway=_inside_write,
    )
    fault_point("ckpt.after_adapter_write", staging / TENSORS_FILE)
    chunks = safetensors_file.file_chunks(optimizer_arrays(state.optimizer), {"format": "np"})
    written[OPTIMIZER_FILE] = durable.write_new(staging / OPTIMIZER_FILE, chunks, midway=_inside_write)
    fault_point("ckpt.after_optimizer_write", staging / OPTIMIZER_FILE)
    if state.answers:
        chunks = safetensors_file.file_chunks(dict(state.answers), {"format": "np"})
        written[ANSWERS_FILE] = durable.write_new(staging / ANSWERS_FILE, chunks, midway=_inside_write)
    written[STATE_FILE] = durable.write_new(staging / STATE_FILE, [state_bytes], midway=_inside_write)
    fault_point("ckpt.after_state_write", staging / STATE_FILE)
    if record_bytes is not None:
        written[RECORD_FILE] = durable.write_new(staging / RECORD_FILE, [record_bytes], midway=_inside_write)
    manifest = encode_manifest(state.step, written, _summary(state))
    durable.write_new(staging / MANIFEST_FILE, [manifest], midway=_inside_write)
    fault_point("ckpt.after_manifest_write", staging / MANIFEST_FILE)
    durable.flush_folder(staging)


def _inside_write(path: Path) -> None:
    fault_point("ckpt.inside_file_write", path)


def _commit(staging: Path, final: Path, run_id: object) -> Path:
    """Give the staged folder its name. An earlier save of the step is moved aside first, and put back by the next
    reader if this process dies between the two renames; one of another run stays aside."""
    fault_point("ckpt.before_rename")
    aside = None
    if os.path.lexists(final):
        prefix = REPLACED if is_sound(final) and _run_in(final) == run_id else CORRUPT
        aside = final.with_name(f"{prefix}{final.name}-{durable.unique_name()}")
        final.rename(aside)
    try:
        if aside is not None:
            fault_point("ckpt.between_replacing_renames")
        staging.rename(final)
    except BaseException:
        if aside is not None:
            aside.rename(final)
        raise
    fault_point("ckpt.after_rename")
    durable.flush_folder(final.parent)
    if aside is not None and aside.name.startswith(REPLACED):
        with suppress(OSError):  # swept at the next start
            durable.remove_tree(aside)
    return final


def _prune(run_dir: Path, newest: TrainingState, *, keep: int, protect: Collection[int]) -> None:
    """Remove sound checkpoints of this run beyond the newest `keep`. Others neither count nor are removed here: unsound
    ones are set aside by the reader where the user can look at them, and those of another run are not ours."""
    ours = _run_of(newest.provenance)
    sound = [
        (step, path)
        for step, path in checkpoints(run_dir)
        if step == newest.step or (is_complete(path) and _run_in(path) == ours)
    ]
    for step, path in sound[:-keep]:
        if step == newest.step or step in protect:
            continue
        doomed = path.with_name(f"{PRUNING}{path.name}-{durable.unique_name()}")
        with suppress(OSError):  # tried again at the next save; what was renamed is swept at the next start
            # Renamed first, so that a half-deleted folder never carries the name of a checkpoint.
            path.rename(doomed)
            fault_point("ckpt.inside_prune")
            durable.remove_tree(doomed)


def _run_of(provenance: Mapping[str, object]) -> object:
    return provenance.get("run_id")


def _run_in(path: Path) -> object:
    """The id of the run that saved a checkpoint; None before there were ids."""
    try:
        return _run_of(read_manifest(path).summary)
    except (BrokenCheckpoint, ForeignSchema):
        return None


def _state_bytes(state: TrainingState) -> bytes:
    unstorable = safetensors_file.unstorable({**state.adapter.tensors, **optimizer_arrays(state.optimizer)})
    try:
        if unstorable:
            raise strict_json.JsonProblem(
                f"tensors of a dtype that safetensors does not support: {', '.join(unstorable)}"
            )
        return strict_json.encode(state_document(state))
    except strict_json.JsonProblem as problem:
        raise CheckpointError(
            "QH-C52",
            f"The state of step {state.step} cannot be stored: {problem}.",
            cause="Only safetensors and strict JSON are written: no NaN, no infinity, no objects.",
            fix="Report this; earlier checkpoints are untouched.",
        ) from problem


def _summary(state: TrainingState) -> dict[str, object]:
    config = state.adapter.config
    return {
        **state.provenance,
        "tokens_seen": state.tokens_seen,
        "r": config.r,
        "alpha": config.alpha,
        "target_module_count": len(config.target_modules),
        "optimizer_exact": state.optimizer.exact,
    }


def _needed_bytes(state: TrainingState) -> int:
    return safetensors_file.file_bytes(state.adapter.tensors) + safetensors_file.file_bytes(
        optimizer_arrays(state.optimizer)
    )


def _safe_step(run_dir: Path) -> str:
    sound = [step for step, path in checkpoints(run_dir) if is_sound(path)]
    return f"Step {sound[-1]} is safe." if sound else "No step has been saved yet."


def _make_durable_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir()
        durable.flush_folder(folder.parent)


def _point_latest(run_dir: Path, final: Path) -> None:
    """A link for people; nothing here reads it, so a file system without links is no failure."""
    temporary = run_dir / f".tmp-{LATEST_LINK}-{durable.unique_name()}"
    with suppress(OSError):
        temporary.symlink_to(os.path.join(final.parent.name, final.name))
        os.replace(temporary, run_dir / LATEST_LINK)
    with suppress(OSError):
        temporary.unlink()


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
