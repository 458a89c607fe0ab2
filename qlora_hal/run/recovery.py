"""run.json written again out of a checkpoint, which keeps a copy of it: a lost or damaged record ends no run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from qlora_hal.checkpoint.reading import checkpoints, kept_record
from qlora_hal.errors import CheckpointError, ConfigError
from qlora_hal.files import durable
from qlora_hal.report.run_file import RUN_FILE, examined_run_file
from qlora_hal.run.identity import config_hash, differing_settings, shown_differences


def read_or_recovered(run_dir: Path) -> tuple[dict[str, object], str]:
    """The content of run.json, from a checkpoint where it is lost or damaged, and a note if so; the folder is locked.

    What was damaged is kept under another name. Raises ConfigError QH-S50 when nothing keeps a copy, CheckpointError
    QH-C20 when the configuration was edited or the checkpoints are of several runs, and as `examined_run_file`.
    """
    content, problem = examined_run_file(run_dir)
    if not problem:
        return content, ""
    copy, source = _newest_copy(run_dir)
    require_config_unchanged(run_dir, content, copy)
    if not copy:
        _refuse(run_dir, problem, has_checkpoints=bool(checkpoints(run_dir)))
    kept = ""
    try:
        if (run_dir / RUN_FILE).exists():
            kept = f"; what was there is kept as {durable.set_aside(run_dir / RUN_FILE).name}"
        durable.write_json_atomically(run_dir / RUN_FILE, copy)
    except OSError as error:
        raise durable.storage_error(error, run_dir, what=RUN_FILE) from error
    return copy, f"{RUN_FILE} was written again from the copy in {source}, because {problem}{kept}"


def require_config_unchanged(run_dir: Path, content: Mapping[str, object], copy: Mapping[str, object]) -> None:
    """A resumed run equals one that was never interrupted. Raises CheckpointError QH-C20 when run.json was edited, with
    the settings that differ from the `copy` in a checkpoint."""
    recorded, config = content.get("config_hash"), content.get("config")
    if recorded is None or not isinstance(config, dict) or config_hash(config) == recorded:
        return
    saved = copy.get("config")
    differing = differing_settings(saved, config, apart_from=lambda _: False) if isinstance(saved, dict) else {}
    listed = shown_differences(differing)
    raise CheckpointError(
        "QH-C20",
        f"The configuration in {RUN_FILE} is not the one that the run began with{': ' + listed if listed else ''}.",
        where=str(run_dir / RUN_FILE),
        cause="Another schedule, batch or adapter from here on would be a run that nobody can reproduce.",
        fix="Undo the edit, or start a new run with the new settings; --model and --data of resume set new paths.",
        context={"differing": {key: list(pair) for key, pair in differing.items()}},
    )


def _newest_copy(run_dir: Path) -> tuple[dict[str, object], str]:
    """The copy in the newest checkpoint that has a whole one, and that checkpoint's name; empty where none has.

    Raises CheckpointError QH-C20 where the checkpoints are of several runs: nothing says then whose the folder is.
    """
    copies = {folder.name: copy for _, folder in reversed(checkpoints(run_dir)) if (copy := kept_record(folder))}
    owners = {name: copy.get("run_id") for name, copy in copies.items()}
    if len(set(owners.values())) > 1:
        listed = ", ".join(f"{name} of {str(owner)[:8]}" for name, owner in owners.items())
        raise CheckpointError(
            "QH-C20",
            f"{RUN_FILE} is lost or damaged, and the checkpoints there belong to several runs: {listed}.",
            where=str(run_dir),
            cause="Nothing is left that says which of them began in this folder.",
            fix="Leave those of one run there, move the others away, and resume again.",
            context={"runs": owners},
        )
    return next(((copy, name) for name, copy in copies.items()), ({}, ""))


def _refuse(run_dir: Path, problem: str, *, has_checkpoints: bool) -> NoReturn:
    raise ConfigError(
        "QH-S50",
        f"{RUN_FILE} of {run_dir} cannot be used: {problem}; the output folder of an earlier run is expected.",
        where=str(run_dir / RUN_FILE),
        cause="No checkpoint there keeps an intact copy of it." if has_checkpoints else "",
        fix="Restore it from a copy, or start a new run in another folder."
        if has_checkpoints
        else "Name the folder that was output_dir of the run, or start a new run in another folder.",
    )
