"""One live run per folder: an operating-system lock, and beside it who holds it.

The lock (`run.lock`) dies with its process, so a reused pid can neither keep nor break it; `run.lock.json` only tells
people, and tells a lock left by a dead owner from one released in order.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import psutil

from qlora_hal.errors import OutputLockedError, StorageError, UnsafeInputError
from qlora_hal.files import strict_json
from qlora_hal.files.durable import storage_error, write_json_atomically
from qlora_hal.files.opening import refuse_link

if TYPE_CHECKING:
    import filelock

LOCK_FILE = "run.lock"
OWNER_FILE = "run.lock.json"


class RunLock:
    """A held lock on a run folder. `note` says whose stale lock was taken over, if any, and what most likely ended that
    process."""

    def __init__(
        self, folder: Path, held: filelock.BaseFileLock, note: str | None, earlier: Mapping[str, object] | None = None
    ) -> None:
        self.note = note
        self._folder = folder
        self._held = held
        self._earlier = earlier
        self._file = _identity(folder / LOCK_FILE)

    @classmethod
    def take(cls, folder: Path, *, force: bool = False) -> RunLock:
        """Lock the folder without waiting.

        Raises OutputLockedError QH-S15 when a live process holds it, QH-S17 when its last owner on another host did not
        release it (`force` takes it then), StorageError when the lock cannot be written, UnsafeInputError QH-X06 when
        another file was put in its place.
        """
        _refuse_foreign_file(folder / LOCK_FILE)
        held = filelock.FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
        try:
            held.acquire()
        except filelock.Timeout as problem:
            raise _held_by_another(folder) from problem
        except (OSError, NotImplementedError) as problem:
            raise _unlockable(folder, problem) from problem
        try:
            earlier = _last_owner(folder)
            note = _note_on(earlier, folder, force=force)
            write_json_atomically(folder / OWNER_FILE, _this_process())
        except OSError as problem:
            held.release()
            raise storage_error(problem, folder, what=OWNER_FILE) from problem
        except BaseException:
            held.release()
            raise
        return cls(folder, held, note, earlier)

    def keep(self) -> str:
        """Whether the lock is still where others look for it, to be asked before something is saved. What to say of one
        that was removed, and is taken again; nothing otherwise.

        Raises OutputLockedError QH-S15 when another process has the folder by now, StorageError.
        """
        if _identity(self._folder / LOCK_FILE) == self._file:
            return ""

        anew = filelock.FileLock(self._folder / LOCK_FILE, timeout=0, thread_local=False)
        try:
            anew.acquire()
            write_json_atomically(self._folder / OWNER_FILE, _this_process())
        except filelock.Timeout as problem:
            raise _taken_meanwhile(self._folder) from problem
        except (OSError, NotImplementedError) as problem:
            raise _unlockable(self._folder, problem) from problem
        self._held.release()
        self._held, self._file = anew, _identity(self._folder / LOCK_FILE)
        return f"{LOCK_FILE} was removed or replaced while this run held it; it is taken again"

    def release(self, *, as_found: bool = False) -> None:
        """Give the folder free. Safe to call twice. `as_found` leaves the traces of a dead owner to the next one who
        comes: this one did nothing here."""
        if not self._held.is_locked:
            return
        with suppress(OSError):  # left behind, it only becomes a note at the next start
            if as_found and self._earlier is not None:
                write_json_atomically(self._folder / OWNER_FILE, self._earlier)
            elif _identity(self._folder / LOCK_FILE) == self._file:
                (self._folder / OWNER_FILE).unlink()
        self._held.release()


def is_held(folder: Path) -> bool | None:
    """Whether a run lives in a folder, told from what its process wrote and without touching the lock; None for a
    process of another host, which cannot be asked."""
    owner = _last_owner(folder)
    if owner is None:
        return False
    if owner.get("host") != socket.gethostname():
        return None
    pid, since = owner.get("pid"), owner.get("since")
    if owner.get("boot_id") != boot_id() or not isinstance(pid, int) or not isinstance(since, str):
        return False
    if isinstance(started := owner.get("started"), int) and (now := _started(pid)) is not None:
        return started == now
    try:
        # A process that began later only has the number of the one that is meant; `since` is in whole seconds.
        return bool(psutil.Process(pid).create_time() < datetime.fromisoformat(since).timestamp() + 1)
    except (psutil.Error, ValueError, OverflowError):
        return False


def boot_id() -> str:
    """What tells one start of this machine from the next."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    return str(int(psutil.boot_time()))


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since this machine started (`starttime`, man 5 proc), which no setting of
    the clock moves; None where it is not told: other systems than Linux, a process that is gone."""
    with suppress(OSError, ValueError, IndexError):
        # The name of the program stands in brackets, and may hold anything.
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    return None


def memory_kills() -> int | None:
    """How many processes the kernel's memory killer has ended since this machine started; None where the system does
    not count them (`oom_kill` of /proc/vmstat, Linux 4.13 and later)."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _identity(file: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        facts = file.stat()
        return facts.st_dev, facts.st_ino
    return None


def _refuse_foreign_file(path: Path) -> None:
    """Some releases of filelock empty the file that they lock; ours is empty, and one that is not has another owner."""
    refuse_link(path)
    with suppress(OSError):  # absent, or told when it is locked
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and (facts.st_nlink == 1 or facts.st_size == 0):
            return
        raise UnsafeInputError(
            "QH-X06",
            f"{path} is {'a second name of another file' if facts.st_nlink > 1 else 'not a regular file'}; the lock of "
            "a run is expected.",
            where=str(path),
            cause="Locking it could change a file elsewhere.",
            fix="Remove it.",
        )


def _this_process() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "boot_id": boot_id(),
        "memory_kills": memory_kills(),
    }


def _last_owner(folder: Path) -> dict[str, object] | None:
    try:
        return strict_json.read_object(folder / OWNER_FILE)
    except (OSError, strict_json.JsonProblem):
        return None


def _described(owner: dict[str, object]) -> str:
    pid, host, since = (ascii(owner.get(key, "?")).strip("'")[:80] for key in ("pid", "host", "since"))
    return f"pid {pid} on host {host} since {since}"


def _likely_end(owner: Mapping[str, object]) -> str:
    """What most likely ended a process of this machine that released nothing."""
    if owner.get("boot_id") != boot_id():
        return "the machine was restarted without releasing it."
    then, now = owner.get("memory_kills"), memory_kills()
    if not isinstance(then, int) or now is None:
        why = "It was killed (by kill -9, or by the system when memory ran out), or it crashed."
    elif now > then:
        count = "a process" if now == then + 1 else f"{now - then} processes"
        why = (
            f"The kernel's memory killer has ended {count} on this machine since then, most likely this one: lower "
            "training.per_device_train_batch_size or data.max_seq_length, or free memory."
        )
    else:
        why = "It was killed (kill -9), or it crashed; the kernel's memory killer has ended no process since then."
    return f"that process has ended without releasing it. {why}"


def _note_on(owner: dict[str, object] | None, folder: Path, *, force: bool) -> str | None:
    if owner is None:
        return None
    if owner.get("host") == socket.gethostname():
        return f"Took over {LOCK_FILE} from {_described(owner)}: {_likely_end(owner)}"
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


def _taken_meanwhile(folder: Path) -> OutputLockedError:
    owner = _last_owner(folder)
    return OutputLockedError(
        "QH-S15",
        f"{LOCK_FILE} was removed while this run held it, and is now held by "
        f"{_described(owner) if owner else 'another process'}.",
        where=str(folder),
        cause="Two runs in one folder would mix their checkpoints, so nothing more is written by this one.",
        fix="Let the other run end, or stop it and resume; what was saved before is there.",
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
