"""The folder of one run: checked before anything heavy starts, locked while the run lives, swept of leftovers.

run.json       configuration as given, its hash, and what the run resolved
run.lock       the lock; run.lock.json tells who holds it
metrics.jsonl  one line per step
checkpoints/   see `qlora_hal.checkpoint`
adapter/       the trained adapter
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import NoReturn

from qlora_hal.checkpoint.reading import (
    checkpoints,
    checkpoints_set_aside,
    restore_replaced,
    unfinished_saves,
)
from qlora_hal.checkpoint.state import CHECKPOINTS_FOLDER, PRUNING, REPLACED, STAGING, checkpoints_folder, entries
from qlora_hal.checkpoint.writing import LATEST_LINK, expected_checkpoint_bytes
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.files import durable, opening, sealed_json
from qlora_hal.files.durable import write_json_atomically
from qlora_hal.files.output_path import refuse_no_path, writable_folder
from qlora_hal.files.refused_paths import expanded, named_path
from qlora_hal.report.run_file import read_run_file
from qlora_hal.run.identity import (
    PLACE_KEYS,
    config_hash,
    differing_settings,
    flat_settings,
    is_place,
    new_run_id,
    shown_value,
)
from qlora_hal.run.lock import LOCK_FILE, OWNER_FILE, RunLock
from qlora_hal.run.recovery import read_or_recovered

__all__ = ["RunDirectory", "config_hash", "rehearsed", "write_json_atomically"]

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
BEST_ADAPTER_FOLDER = "best_adapter"
SCHEMA_VERSION = 1

_OUTPUTS = (
    *(CHECKPOINTS_FOLDER, LATEST_LINK, ADAPTER_FOLDER, BEST_ADAPTER_FOLDER, METRICS_FILE, "report.html", "loss.svg"),
    *("tokens", "rows.jsonl", "validation_rows.jsonl"),
    "loss.png",  # the picture that releases up to 0.2 drew
)
"""What an overwritten run leaves; other files in the folder are the user's and are never touched."""
_OWN = (*(name for name in _OUTPUTS if name != LATEST_LINK), RUN_FILE, LOCK_FILE, OWNER_FILE, "tensorboard")
"""What a run writes or trusts there. A link under one of these names was planted; `latest` is never read."""
RUN_FOLDERS = frozenset({CHECKPOINTS_FOLDER, ADAPTER_FOLDER, BEST_ADAPTER_FOLDER, "tokens", "tensorboard"})
"""Those of them that are folders."""
_INPUTS = frozenset(
    {
        *("model.name_or_path", "data.path", "data.validation_path", "data.chat_template"),
        "quantization.calibration_path",
    }
)
"""Settings that may name something to read."""
_LEFTOVER = re.compile(rf"({re.escape(STAGING)}|{re.escape(PRUNING)}|{re.escape(REPLACED)}|\.tmp-).+-[0-9a-f]{{8}}")
"""Names that end as `durable.unique_name` ends them; what is called `.tmp` otherwise is the user's."""


class RunDirectory:
    """A run's folder, locked until `close`.

    `notes` are for the user, `unfinished_saves` the steps whose save broke off. Without a lock it is only read: by a
    rank that another one writes for.
    """

    def __init__(self, path: Path, lock: RunLock | None, content: Mapping[str, object]) -> None:
        self.path = path
        self.notes: list[str] = [lock.note] if lock is not None and lock.note else []
        self.unfinished_saves: tuple[int, ...] = ()
        self._lock = lock
        self._content = dict(content)

    @classmethod
    def open_new(
        cls,
        output_dir: str | Path,
        *,
        config: Mapping[str, object],
        overwrite: bool = False,
        force_unlock: bool = False,
        launch: str = "",
    ) -> RunDirectory:
        """Create or reuse a folder for a new run and write its first `run.json`.

        `config` is JSON (`RunConfig.model_dump(mode="json")`), as the user gave it: before a seed is drawn. `launch`
        says who starts the run anew when it fails (`ranks.identity.launch_here`).
        Raises StorageError QH-S14 (no usable kind of path), QH-S12 (cannot be written), QH-S09 (no space),
        OutputLockedError QH-S15 and QH-S17, ConfigError QH-S13 when an earlier run is there and `overwrite` is not set.
        """
        _refuse_what_is_not_for_runs(Path(output_dir), config)
        path = writable_folder(Path(output_dir))
        _refuse_planted(path)
        lock = RunLock.take(path, force=force_unlock)
        try:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            content = {"schema_version": SCHEMA_VERSION, "config": dict(config), "created": created}
            content["run_id"] = new_run_id()
            content |= {"launch": launch} if launch else {}
            run = cls(path, lock, {**content, "config_hash": config_hash(config)})
            run._settle_with_earlier_run(config, overwrite=overwrite)
            run._sweep()
            run.record({})
        except ConfigError as refusal:
            lock.release(as_found=True)
            if lock.note:  # how that run ended is worth knowing when it stands in the way
                refusal.cause = f"{refusal.cause} {lock.note}".strip()
            raise
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def open_existing(cls, run_dir: str | Path, *, force_unlock: bool = False) -> RunDirectory:
        """Lock and sweep the folder of a run that is to go on. A run.json that is lost or damaged is written again
        from a checkpoint, with a note.

        Raises ConfigError QH-S50 when it is no run's folder, UnsafeInputError QH-X06 for a planted link or another
        kind of file, CheckpointError QH-C20 (an edited configuration) and QH-C13, StorageError and OutputLockedError
        as `open_new`.
        """
        path = named_path(run_dir)
        if not os.path.lexists(path / RUN_FILE) and not os.path.lexists(path / CHECKPOINTS_FOLDER):
            _refuse_foreign(path, f"has no {RUN_FILE}")
        path = writable_folder(path)
        _refuse_planted(path)
        lock = RunLock.take(path, force=force_unlock)
        try:
            content, note = read_or_recovered(path)
            run = cls(path, lock, content)
            run.notes += [note] if note else []
            run._sweep()
        except BaseException:
            lock.release()
            raise
        return run

    @property
    def content(self) -> Mapping[str, object]:
        """What `run.json` holds."""
        return self._content

    @property
    def adapter_dir(self) -> Path:
        return self.path / ADAPTER_FOLDER

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS_FILE

    def record(self, facts: Mapping[str, object]) -> None:
        """Add facts to `run.json`, as one act. Raises StorageError; JsonProblem for facts that are not JSON."""
        content = sealed_json.sealed({**self._content, **facts})
        try:
            write_json_atomically(self.path / RUN_FILE, content)
        except OSError as problem:
            raise durable.storage_error(problem, self.path, what=RUN_FILE) from problem
        self._content = content

    def free_space_note(self, adapter_parameters: int) -> str | None:
        """A warning when the disk has not room for two checkpoints of an adapter of this size, else None (row S10)."""
        size = expected_checkpoint_bytes(adapter_parameters)
        free = durable.free_bytes(self.path)
        if free is None or free >= 2 * size:
            return None
        return (
            f"QH-S10: {_readable(free)} are free at {self.path}, a checkpoint needs about {_readable(size)} and two "
            "are kept; a save may fail. Free space or choose another output folder."
        )

    def keep_lock(self) -> str:
        """To be called before something is saved; what to say of a lock that vanished. Raises as `RunLock.keep`."""
        return self._lock.keep() if self._lock is not None else ""

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _settle_with_earlier_run(self, config: Mapping[str, object], *, overwrite: bool) -> None:
        """Refuse, clear away, or find nothing of an earlier run here."""
        outputs = _outputs_in(self.path)
        if not os.path.lexists(self.path / RUN_FILE):
            return
        if not overwrite:
            self.notes += _refuse_unless_it_never_began(self.path, config, outputs)
        _refuse_to_remove_inputs(self.path, config, outputs)
        # run.json goes last, by replacement: until then a crash leaves the old run recognisable as such.
        for name in outputs:
            try:
                durable.remove_tree(self.path / name)
            except OSError as problem:
                raise durable.storage_error(problem, self.path / name, what="a new run") from problem

    def _sweep(self) -> None:
        """Remove what interrupted saves left, and say how much it was."""
        self.notes += restore_replaced(self.path)
        _restore_replaced_adapters(self.path)
        self.unfinished_saves = unfinished_saves(self.path)
        count = freed = 0
        for folder in (self.path, checkpoints_folder(self.path)):
            for entry in entries(folder):
                if _LEFTOVER.fullmatch(entry.name):
                    with suppress(OSError):  # stays for the next sweep
                        freed += durable.remove_tree(Path(entry.path))
                        count += 1
        if count:
            noun = "leftover" if count == 1 else "leftovers"
            self.notes.append(f"Removed {count} {noun} of interrupted saves, {_readable(freed)} freed.")


@contextmanager
def rehearsed(output_dir: str | Path, *, config: Mapping[str, object], overwrite: bool = False) -> Iterator[Path]:
    """A folder for a run that stops before it begins: `output_dir` is judged as `RunDirectory.open_new` would, and
    nothing is left there, nor taken away. Raises as that does, but for the lock."""
    _refuse_what_is_not_for_runs(Path(output_dir), config)
    given = expanded(output_dir)
    _refuse_planted(given)
    absent = [folder for folder in (given, *given.parents) if not os.path.lexists(folder)]
    try:
        path = writable_folder(given)
        outputs = _outputs_in(path)
        if os.path.lexists(path / RUN_FILE):
            if not overwrite:
                _refuse_unless_it_never_began(path, config, outputs)
            _refuse_to_remove_inputs(path, config, outputs)
    finally:
        for folder in absent:  # the innermost first
            with suppress(OSError):
                folder.rmdir()
    with tempfile.TemporaryDirectory(prefix="qlora-hal-dry-run-") as scratch:
        yield Path(scratch)


def _restore_replaced_adapters(path: Path) -> None:
    """Put back what a crash between two renames left aside (`adapter.peft_files.write_adapter`)."""
    for name in (ADAPTER_FOLDER, BEST_ADAPTER_FOLDER):
        for entry in entries(path):
            if re.fullmatch(rf"{re.escape(REPLACED + name)}-[0-9a-f]+", entry.name) and not os.path.lexists(
                path / name
            ):
                with suppress(OSError):
                    Path(entry.path).rename(path / name)
                    durable.flush_folder(path)


def _refuse_what_is_not_for_runs(output_dir: Path, config: Mapping[str, object]) -> None:
    """Raise StorageError QH-S14 for a folder in which a run's files would lie among others: the root of the file
    system, the home folder, one that the run reads, and one with files of other users; and as `refuse_no_path`."""
    refuse_no_path(output_dir)
    path = Path(os.path.realpath(expanded(output_dir)))
    what = {
        path.anchor: "the root of the file system",
        os.path.realpath(os.path.expanduser("~")): "the home folder",
    }.get(str(path))
    holds_a_run = os.path.lexists(path / RUN_FILE)
    for setting, value in _inputs(config):
        is_read = path.is_dir() and os.path.realpath(expanded(value)) == str(path)
        if is_read and (setting == "model.name_or_path" or not holds_a_run):  # an earlier run is told as one
            what = what or f"the folder of {setting}, which the run reads"
    if what is None and not holds_a_run and (other := _of_another_user(path)):
        what = f"a folder with files of other users ({other} among them)"
    if what is not None:
        raise StorageError(
            "QH-S14",
            f"output_dir is {output_dir}, {what}; a folder for this run alone is expected.",
            where="output_dir",
            fix=f"Name a new folder in it, or elsewhere: {quote(str(output_dir / 'run'))}",
        )


def _of_another_user(folder: Path) -> str:
    """The name of something there that another user made; "" where there is nothing, where that cannot be told, and for
    the superuser, whom containers run as and whose files are often another user's."""
    me = getattr(os, "getuid", lambda: 0)()
    if me == 0:
        return ""
    with suppress(OSError), os.scandir(folder) as there:
        return next((entry.name for entry in there if entry.stat(follow_symlinks=False).st_uid != me), "")
    return ""


def _inputs(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Settings that name something to read, with what they name."""
    for setting, value in flat_settings(config):
        if (setting in _INPUTS or is_place(setting)) and setting != "output_dir" and isinstance(value, str) and value:
            yield setting, value


def _refuse_planted(path: Path) -> None:
    for name in _OWN:
        opening.refuse_other_kind(path / name, "a folder" if name in RUN_FOLDERS else "a regular file")


def _readable(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _outputs_in(path: Path) -> list[str]:
    """What runs write there. Raises ConfigError QH-S13 where there is some, and no run."""
    outputs = [name for name in _OUTPUTS if os.path.lexists(path / name)]
    if outputs and not os.path.lexists(path / RUN_FILE):
        _refuse_foreign_outputs(path, outputs)
    return outputs


def _refuse_unless_it_never_began(path: Path, config: Mapping[str, object], outputs: Sequence[str]) -> list[str]:
    """Notes on an earlier run that may be started over. Raises ConfigError QH-S13 for any that is worth something."""
    earlier = read_run_file(path)["config"]
    differing = differing_settings(
        earlier if isinstance(earlier, dict) else {}, config, apart_from=PLACE_KEYS.__contains__
    )
    saved, set_aside = len(checkpoints(path)), len(checkpoints_set_aside(path))
    if saved or set_aside or ADAPTER_FOLDER in outputs or (differing and _has_content(path / METRICS_FILE)):
        _refuse_earlier_run(path, differing, saved, set_aside)
    if not _has_content(path / METRICS_FILE):
        return ["An earlier attempt in this folder ended before its first step; starting again."]
    return ["An earlier run with this configuration stopped before its first save; starting again."]


def _refuse_to_remove_inputs(path: Path, config: Mapping[str, object], outputs: Sequence[str]) -> None:
    """Raise ConfigError QH-S13 where the new run would read what it removes first, as the rows that an earlier run
    kept."""
    removed = [Path(os.path.realpath(path)), *(Path(os.path.realpath(path / name)) for name in outputs)]
    for setting, value in _inputs(config):
        given = Path(os.path.realpath(expanded(value)))
        is_run_itself = given == removed[0] and setting != "model.name_or_path"  # whose files are left where they are
        if is_run_itself or any(given.is_relative_to(place) for place in removed[1:]):
            raise ConfigError(
                "QH-S13",
                f"{setting} is {value}, which is part of the earlier run in {path}.",
                where=setting,
                cause="A new run there replaces the earlier one, and would remove what it is to read.",
                fix="Choose another output_dir, or move what is to be read out of this one.",
            )


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def _refuse_earlier_run(
    path: Path, differing: Mapping[str, tuple[object, object]], saved: int, set_aside: int
) -> NoReturn:
    pairs = list(differing.items())[:8]
    listed = ", ".join(f"{key} (there {shown_value(then)}, now {shown_value(now)})" for key, (then, now) in pairs)
    counted = f"{len(differing)} {'key differs' if len(differing) == 1 else 'keys differ'}"
    what = f"another configuration; {counted}: {listed}" if differing else "this same configuration"
    going_on = (
        f"Resume the old run (qlora-hal resume {quote(str(path))}), replace it"
        if saved or set_aside
        else "Replace the old run"
    )
    beside = f", and {set_aside} that did not verify when it was resumed" if set_aside else ""
    raise ConfigError(
        "QH-S13",
        f"{path} holds a run with {what}; it has {saved} checkpoint{'' if saved == 1 else 's'}{beside}. An empty or "
        "new folder is expected.",
        where="output_dir",
        cause="A new run there would mix with the old one, or replace it.",
        fix=f"{going_on} (--overwrite), or choose another output_dir.",
        context={"differing": {key: list(pair) for key, pair in differing.items()}, "checkpoints": saved},
    )


def _refuse_foreign_outputs(path: Path, outputs: Sequence[str]) -> NoReturn:
    or_resume = (
        f"; qlora-hal resume {quote(str(path))} writes {RUN_FILE} again from a checkpoint" if checkpoints(path) else ""
    )
    raise ConfigError(
        "QH-S13",
        f"{path} holds {', '.join(outputs)} but no {RUN_FILE}, so no run of qlora_hal is known to have made them.",
        where="output_dir",
        cause="Nothing that may belong to someone else is overwritten, not even with --overwrite.",
        fix=f"Choose another output_dir{or_resume}.",
    )


def _refuse_foreign(path: Path, problem: str, cause: BaseException | None = None) -> NoReturn:
    raise ConfigError(
        "QH-S50",
        f"{path} {problem}; the output folder of an earlier run is expected.",
        where=str(path),
        fix="Name the folder that was output_dir of the run, or start a new run in another folder.",
    ) from cause
