"""One live run per folder: an operating-system lock, and beside it who holds it.

The lock (`run.lock`) dies with its process, so a reused pid can neither keep nor break it; `run.lock.json` only tells
people, and tells a lock left by a dead owner from one released in order.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal import strict_json
from qlora_hal.durable_files import refuse_link, storage_error, write_json_atomically
from qlora_hal.errors import OutputLockedError, StorageError, UnsafeInputError

if TYPE_CHECKING:
    import filelock

LOCK_FILE = "run.lock"
OWNER_FILE = "run.lock.json"


class RunLock:
    """A held lock on a run folder. `note` says whose stale lock was taken over, if any."""

    def __init__(self, folder: Path, held: filelock.BaseFileLock, note: str | None) -> None:
        self.note = note
        self._folder = folder
        self._held = held

    @classmethod
    def take(cls, folder: Path, *, force: bool = False) -> RunLock:
        """Lock the folder without waiting.

        Raises OutputLockedError QH-S15 when a live process holds it, QH-S17 when its last owner on another host did not
        release it (`force` takes it then), StorageError when the lock cannot be written, UnsafeInputError QH-X06 when
        another file was put in its place.
        """
        import filelock

        _refuse_foreign_file(folder / LOCK_FILE)
        held = filelock.FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
        try:
            held.acquire()
        except filelock.Timeout as problem:
            raise _held_by_another(folder) from problem
        except (OSError, NotImplementedError) as problem:
            raise _unlockable(folder, problem) from problem
        try:
            note = _note_on_last_owner(folder, force=force)
            write_json_atomically(folder / OWNER_FILE, _this_process())
        except OSError as problem:
            held.release()
            raise storage_error(problem, folder, what=OWNER_FILE) from problem
        except BaseException:
            held.release()
            raise
        return cls(folder, held, note)

    def release(self) -> None:
        """Give the folder free. Safe to call twice."""
        if self._held.is_locked:
            with suppress(OSError):  # left behind, it only becomes a note at the next start
                (self._folder / OWNER_FILE).unlink()
            self._held.release()


def boot_id() -> str:
    """What tells one start of this machine from the next."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    import psutil

    return str(int(psutil.boot_time()))


def _refuse_foreign_file(path: Path) -> None:
    """Some releases of filelock empty the file that they lock; ours is empty, and one that is not has another owner."""
    refuse_link(path)
    with suppress(OSError):  # absent, or told when it is locked
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and (facts.st_nlink == 1 or facts.st_size == 0):
            return
        raise UnsafeInputError(
            "QH-X06",
            f"{path} is {'a second name of another file' if facts.st_nlink > 1 else 'no ordinary file'}; the lock of a "
            "run is expected.",
            where=str(path),
            cause="Locking it could change a file elsewhere.",
            fix="Remove it.",
        )


def _this_process() -> dict[str, object]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": started, "boot_id": boot_id()}


def _last_owner(folder: Path) -> dict[str, object] | None:
    try:
        return strict_json.read_object(folder / OWNER_FILE)
    except (OSError, strict_json.JsonProblem):
        return None


def _described(owner: dict[str, object]) -> str:
    pid, host, since = (ascii(owner.get(key, "?")).strip("'")[:80] for key in ("pid", "host", "since"))
    return f"pid {pid} on host {host} since {since}"


def _note_on_last_owner(folder: Path, *, force: bool) -> str | None:
    owner = _last_owner(folder)
    if owner is None:
        return None
    if owner.get("host") == socket.gethostname():
        ended = "the machine was restarted" if owner.get("boot_id") != boot_id() else "that process has ended"
        return f"Took over {LOCK_FILE} from {_described(owner)}: {ended} without releasing it."
    if force:
        return f"Took over {LOCK_FILE} from {_described(owner)} on request."
    raise OutputLockedError(
        "QH-S17",
        f"{LOCK_FILE} was taken by {_described(owner)} and never released; this is host {socket.gethostname()}.",
        where=str(folder / OWNER_FILE),
        cause="Locks on shared folders do not always reach other hosts, so that run may still be alive.",
        fix="Make sure that it has ended, then pass --force-unlock.",
        context={"owner": owner},
    )


def _held_by_another(folder: Path) -> OutputLockedError:
    owner = _last_owner(folder)
    return OutputLockedError(
        "QH-S15",
        f"{LOCK_FILE} is held by {_described(owner) if owner else 'another process'}.",
        where=str(folder),
        cause="Two runs in one folder would mix their checkpoints.",
        fix="Wait for that run or stop it, or choose another output folder.",
        context={"owner": owner or {}},
    )


def _unlockable(folder: Path, problem: OSError | NotImplementedError) -> StorageError:
    if isinstance(problem, OSError):
        return storage_error(problem, folder / LOCK_FILE, what="the run's lock")
    return StorageError(
        "QH-S55",
        f"{folder} is on a file system without locks.",
        where=str(folder),
        cause=str(problem),
        fix="Choose an output folder on a local disk.",
    )
