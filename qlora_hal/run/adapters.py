"""The adapters in a run's folder, `adapter/` and `best_adapter/`: whole and this run's own, or set aside."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from qlora_hal.adapter.peft_files import read_adapter, read_provenance
from qlora_hal.checkpoint import checkpoints, load_checkpoint
from qlora_hal.errors import AdapterError, CheckpointError, QloraHalError
from qlora_hal.files import durable, opening
from qlora_hal.run.directory import BEST_ADAPTER_FOLDER

if TYPE_CHECKING:
    from qlora_hal.contract.values import Adapter
    from qlora_hal.run.callbacks import RunCallbacks
    from qlora_hal.run.directory import RunDirectory
    from qlora_hal.run.loop import Progress


def adapter_problem(folder: Path, run_id: object) -> str:
    """What speaks against an adapter as the one that this run wrote; nothing for a whole one of its own. What an
    earlier release wrote carries neither hash nor id."""
    try:
        opening.refuse_link(folder)
        read_adapter(folder)
        return _foreign(read_provenance(folder).get("run_id"), run_id)
    except QloraHalError as problem:
        return problem.message.rstrip(".")


def _foreign(owner: object, run_id: object) -> str:
    if owner == run_id:
        return ""
    return "it belongs to another run" if owner is not None else "nothing shows that this run wrote it"


def require_own_adapter(folder: Path, run_id: object) -> None:
    """The adapter in a run's folder is that run's. Raises AdapterError QH-C22."""
    if problem := _foreign(read_provenance(folder).get("run_id"), run_id):
        raise AdapterError(
            "QH-C22",
            f"{folder} does not hold the adapter that its run wrote: {problem}.",
            where=str(folder),
            cause="It was put there later.",
            fix=f"Restore it: qlora-hal resume {quote(str(folder.parent))} writes it again; "
            "or name the adapter and its model: --adapter DIR --model MODEL.",
        )


def mend_adapters(directory: RunDirectory, progress: Progress, recorder: RunCallbacks) -> None:
    """Before a resumed run goes on: what was damaged goes aside, and the best adapter so far comes back from the
    checkpoint of its step, where there still is one. Raises StorageError."""
    run_id, best = directory.content.get("run_id"), directory.path / BEST_ADAPTER_FOLDER
    for folder in (directory.adapter_dir, best):
        set_aside_damaged(folder, run_id, recorder.note)
    if progress.best_step is None or (best.is_dir() and read_provenance(best).get("step") == progress.best_step):
        return
    saved = _saved_adapter(directory.path, progress.best_step, run_id)
    if saved is not None:
        recorder.best(progress.best_step, saved)
        recorder.note(f"{best.name} was written again from the checkpoint of step {progress.best_step}")
        return
    if best.is_dir():  # that of a step that is taken again; the run may come to it once more
        return
    recorder.note(
        f"the adapter of step {progress.best_step}, with the lowest validation loss so far, is lost: only one that is "
        "better still can replace the last"
    )


def _saved_adapter(run_dir: Path, step: int, run_id: object) -> Adapter | None:
    for saved, path in checkpoints(run_dir):
        if saved == step:
            with suppress(CheckpointError):
                state = load_checkpoint(path)
                return state.adapter if state.provenance.get("run_id") == run_id else None
    return None


def set_aside_damaged(folder: Path, run_id: object, tell: Callable[[str], None]) -> None:
    """Keep what is there and is not this run's whole adapter under another name. Raises StorageError."""
    problem = adapter_problem(folder, run_id) if os.path.lexists(folder) else ""
    if not problem:
        return
    try:
        kept = durable.set_aside(folder)
    except OSError as error:
        raise durable.storage_error(error, folder, what=f"another name for {folder.name}") from error
    tell(f"{folder.name} is not what this run wrote there: {problem}; it is kept as {kept.name}")
