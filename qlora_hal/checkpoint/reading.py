"""Finding the newest checkpoint that verifies, and loading it. Newest means by step: clocks and modification times lie.

What fails verification is never deleted, only renamed to `.corrupt-...`, and always reported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TypeVar

from qlora_hal.adapter import peft_experts
from qlora_hal.adapter.as_written import WRITTEN
from qlora_hal.adapter.peft_files import CONFIG_FILE, PROVENANCE_FILE, TENSORS_FILE
from qlora_hal.checkpoint.manifest import (
    BrokenCheckpoint,
    ForeignSchema,
    Manifest,
    check_hashes,
    file_sha256,
    is_sound,
    read_manifest,
)
from qlora_hal.checkpoint.state import (
    ANSWERS_FILE,
    CORRUPT,
    OPTIMIZER_FILE,
    RECORD_FILE,
    REPLACED,
    STAGING,
    STATE_FILE,
    TrainingState,
    checkpoints_folder,
    entries,
    state_from,
    step_of,
)
from qlora_hal.errors import CheckpointError, QloraHalError
from qlora_hal.files import durable, strict_json
from qlora_hal.files.opening import open_regular
from qlora_hal.files.safetensors_file import Array, TensorFile, read_arrays

_READ_WHOLE = frozenset({STATE_FILE, TENSORS_FILE, OPTIMIZER_FILE, ANSWERS_FILE, PROVENANCE_FILE})


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything named as a checkpoint, by rising step, unverified. Links are not among them."""
    found = []
    for entry in entries(checkpoints_folder(run_dir)):
        step = step_of(entry.name)
        if step is not None and entry.is_dir(follow_symlinks=False):
            found.append((step, Path(entry.path)))
    return sorted(found)


def _linked(run_dir: Path) -> dict[str, int]:
    """Names of checkpoints that are links, with their steps."""
    named = ((entry.name, step_of(entry.name)) for entry in entries(checkpoints_folder(run_dir)) if entry.is_symlink())
    return {name: step for name, step in named if step is not None}


def latest_valid_checkpoint(run_dir: Path, *, set_aside_broken: bool = True) -> tuple[Path, list[str]]:
    """The newest checkpoint whose manifest and hashes verify, and notes on everything passed over.

    Broken ones are renamed to `.corrupt-...`, which only the holder of the run's lock may do; `set_aside_broken` False
    is for readers beside a live run. Raises CheckpointError QH-C04 (exit status 9) when none verifies.
    """
    _, path, notes = _newest(run_dir, check_hashes, set_aside_broken=set_aside_broken)
    return path, notes


def latest_state(run_dir: Path) -> tuple[TrainingState, Path, list[str]]:
    """What `latest_valid_checkpoint` finds, loaded: each byte is hashed once, as it is read.

    Raises CheckpointError QH-C04, also for one whose hashes verify and whose content makes no sense.
    """
    return _newest(run_dir, _state_in, set_aside_broken=True)


def load_checkpoint(path: Path) -> TrainingState:
    """The state saved in a checkpoint folder, every byte checked against the manifest as it is read.

    Raises CheckpointError: QH-C04 (a file is missing or altered, all are named), QH-C13 (another schema version).
    """
    try:
        manifest = read_manifest(path)
        _check_step(path, manifest)
        return _state_in(path, manifest)
    except ForeignSchema as problem:
        raise CheckpointError(
            "QH-C13",
            f"{path.name} was saved by another version of qlora_hal: {problem}.",
            where=str(path),
            fix="Resume with the version that saved it.",
        ) from problem
    except BrokenCheckpoint as problem:
        raise _unusable(path, str(problem)) from problem


Taken = TypeVar("Taken")

_IS_A_LINK = "it is a link, and links are not followed: put the folder itself there"


def _newest(
    run_dir: Path, take: Callable[[Path, Manifest], Taken], *, set_aside_broken: bool
) -> tuple[Taken, Path, list[str]]:
    """What `take` makes of the newest checkpoint that it does not find broken, its folder, and notes."""
    notes = restore_replaced(run_dir) if set_aside_broken else []
    links = _linked(run_dir)
    failures = dict.fromkeys(links, _IS_A_LINK)
    for step, path in reversed(checkpoints(run_dir)):
        try:
            manifest = read_manifest(path)
            _check_step(path, manifest)
            taken = take(path, manifest)
        except ForeignSchema as problem:
            failures[path.name] = str(problem)
            notes.append(f"Skipped {path.name}: {problem}; it was left unchanged.")
        except BrokenCheckpoint as problem:
            failures[path.name] = str(problem)
            kept = set_aside(path) if set_aside_broken else path
            left = "left unchanged" if kept == path else f"kept as {kept.name}"
            notes.append(f"Skipped {path.name}: {problem}; it is {left}.")
        else:
            notes += [f"Skipped {name}: {_IS_A_LINK}." for name, linked in sorted(links.items()) if linked > step]
            notes += unfinished_notes(step, unfinished_saves(run_dir))
            return taken, path, notes
    raise _no_checkpoint(run_dir, failures)


def _state_in(path: Path, manifest: Manifest) -> TrainingState:
    """Raises BrokenCheckpoint, naming every file that was altered; CheckpointError QH-C04 where none was."""
    try:
        check_hashes(path, manifest, apart_from=_READ_WHOLE)  # whose digests are of the bytes as they are taken in
        document = _verified_document(path / STATE_FILE, manifest)
        adapter = _verified_arrays(path / TENSORS_FILE, manifest)
        optimizer = _verified_arrays(path / OPTIMIZER_FILE, manifest)
        answers = _verified_arrays(path / ANSWERS_FILE, manifest).arrays if ANSWERS_FILE in manifest.files else {}
        state = state_from(document, _in_stacks(adapter.arrays, document), optimizer.arrays, answers)
        _check_same_origin(path, manifest, state, adapter.sha256)
    except (BrokenCheckpoint, OSError, QloraHalError, ValueError) as problem:
        check_hashes(path, manifest)
        if isinstance(problem, BrokenCheckpoint):
            raise
        reason = problem.message if isinstance(problem, QloraHalError) else f"{problem}"
        raise _unusable(path, reason) from problem
    return state


def _in_stacks(adapter: Mapping[str, Array], document: Mapping[str, object]) -> dict[str, Array]:
    """The adapter's tensors as the core has them. Raises ValueError."""
    settings, provenance = document.get("adapter"), document.get("provenance")
    r = settings.get("r") if isinstance(settings, dict) else None
    return peft_experts.stacked(peft_experts.named(adapter, r, provenance if isinstance(provenance, dict) else {}))


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "QH-C04",
        f"{path.name} does not verify: {reason.rstrip('.')}.",
        where=str(path),
        cause="A file is missing or changed after the save; continuing would reset or corrupt the optimizer.",
        fix=f"Resume from an earlier checkpoint.{_weights_only_hint(path)}",
    )


def kept_record(path: Path) -> dict[str, object]:
    """The copy of run.json in a checkpoint, checked against the manifest; empty where no whole one is there."""
    try:
        manifest = read_manifest(path)
        if RECORD_FILE not in manifest.files:
            return {}
        return _verified_document(path / RECORD_FILE, manifest)
    except (BrokenCheckpoint, ForeignSchema, OSError, strict_json.JsonProblem):
        return {}


def unfinished_saves(run_dir: Path) -> tuple[int, ...]:
    """Steps whose save was begun and never finished, by rising step."""
    names = (entry.name for entry in entries(checkpoints_folder(run_dir)))
    found = (re.fullmatch(re.escape(STAGING) + r"([0-9]{1,15})-[0-9a-f]+", name) for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))


def unfinished_notes(resumed_step: int, unfinished: tuple[int, ...]) -> list[str]:
    """What a user is told when a later save did not finish."""
    begun = f"Resumed from step {resumed_step}: the save of step "
    return [
        f"{begun}{step} did not finish; {step - resumed_step} steps are redone."
        for step in unfinished
        if step > resumed_step
    ]


def restore_replaced(run_dir: Path) -> list[str]:
    """Put back a checkpoint that was moved aside for a newer save of its step, unless that save is there and sound."""
    notes = []
    for entry in entries(checkpoints_folder(run_dir)):
        match = re.fullmatch(re.escape(REPLACED) + r"(step-[0-9]+)-[0-9a-f]+", entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            continue
        aside = Path(entry.path)
        final = aside.parent / match[1]
        if os.path.lexists(final) and (is_sound(final) or set_aside(final) == final):
            continue
        with suppress(OSError):  # a folder that cannot be written keeps it under the other name, unread
            aside.rename(final)
            durable.flush_folder(aside.parent)
            notes.append(f"Restored {match[1]}, whose replacement did not finish.")
    return notes


def set_aside(path: Path) -> Path:
    """Rename a broken checkpoint to `.corrupt-...`; where that is impossible it stays, and its path is returned."""
    target = path.with_name(f"{CORRUPT}{path.name}-{durable.unique_name()}")
    try:
        path.rename(target)
    except OSError:
        return path
    with suppress(OSError):  # after a power loss it may come back under its name, and is set aside again
        durable.flush_folder(path.parent)
    return target


def _check_step(path: Path, manifest: Manifest) -> None:
    named = step_of(path.name)
    if named is not None and named != manifest.step:
        raise BrokenCheckpoint(f"its manifest is of step {manifest.step}")


def _check_same_origin(path: Path, manifest: Manifest, state: TrainingState, adapter_sha256: str) -> None:
    """The adapter and the state beside it were written as one: of one run, and with these tensors."""
    if PROVENANCE_FILE not in manifest.files:
        return
    document = _verified_document(path / PROVENANCE_FILE, manifest)
    written = document.get(WRITTEN)
    if document.get("run_id") != state.provenance.get("run_id"):
        raise BrokenCheckpoint("its adapter and its optimizer belong to different runs")
    if isinstance(written, dict) and written.get("sha256") != adapter_sha256:
        raise BrokenCheckpoint(f"{PROVENANCE_FILE} belongs to another adapter")


def _verified_document(path: Path, manifest: Manifest) -> dict[str, object]:
    with open_regular(path) as stream:
        raw = stream.read(strict_json.MAX_JSON_BYTES + 1)
    if hashlib.sha256(raw).hexdigest() != manifest.files[path.name].sha256:
        raise BrokenCheckpoint(f"{path.name} does not match its hash")
    return strict_json.decode_object(raw)


def _verified_arrays(path: Path, manifest: Manifest) -> TensorFile:
    # The digest is of the very bytes in the arrays: nothing can change between check and use.
    contents = read_arrays(path)
    if contents.sha256 != manifest.files[path.name].sha256:
        raise BrokenCheckpoint(f"{path.name} does not match its hash")
    return contents


def _no_checkpoint(run_dir: Path, failures: Mapping[str, str]) -> CheckpointError:
    listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    return CheckpointError(
        "QH-C04",
        f"No checkpoint in {run_dir} verifies ({len(failures)} tried). {listed}".rstrip() + "." * bool(failures),
        where=str(checkpoints_folder(run_dir)),
        cause="" if failures else "The run stopped before its first save.",
        fix="Start the run again with --overwrite, or in another folder.",
        context={"failures": dict(failures)},
    )


def _weights_only_hint(path: Path) -> str:
    """Offered only when the adapter itself is whole."""
    try:
        manifest = read_manifest(path)
        whole = all(file_sha256(path / name) == manifest.files[name].sha256 for name in (TENSORS_FILE, CONFIG_FILE))
    except (BrokenCheckpoint, ForeignSchema, OSError):
        return ""
    return f" Its adapter alone is intact: qlora-hal generate --adapter {quote(str(path))} opens it." if whole else ""
