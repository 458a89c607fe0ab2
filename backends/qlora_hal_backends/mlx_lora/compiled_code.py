"""Where MLX's CPU library puts the code that it compiles: a folder that this process alone reads and writes.

On a CPU, MLX 0.32 compiles fused operations with g++ into `$TMPDIR/mlx/VERSION/cpu`, under names that anyone can
compute, straight into the file that it loads. In a folder of several processes one loads what another has half written;
in a /tmp of many users whoever comes first owns it. So each process has a folder of its own, which goes with it. The
libraries that it loaded are kept, whole and under their final names, where only this user can write; the next process
starts with links to them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock

import mlx.core as mx

from qlora_hal.files.durable import unique_name
from qlora_hal.files.scratch import scratch_folder

FOLDER_PREFIX = "qlora_hal-mlx-"
KEPT_PREFIX = "qlora_hal-mlx_kept-"
_VERSION = str(vars(mx)["__version__"])
_MAPS = Path("/proc/self/maps")


@contextmanager
def compiling_in_own_folder() -> Iterator[None]:
    """MLX looks for compiled code, and compiles, in this process's folder. `TMPDIR` is as before when the last caller
    has left: MLX reads it whenever it compiles, and nobody else's files or child processes belong there."""
    if os.name != "posix" or mx.metal.is_available():
        yield
        return
    path = str(_folder_of(os.getpid()).path)
    _TMPDIR.enter(path)
    try:
        yield
    finally:
        _TMPDIR.leave()


@dataclass(slots=True)
class _SharedVariable:
    """The environment is one for all threads: the first to come sets the variable, the last to go puts it back."""

    callers: int = 0
    before: str | None = None
    lock: Lock = field(default_factory=Lock)

    def enter(self, value: str) -> None:
        with self.lock:
            if self.callers == 0:
                self.before = os.environ.get("TMPDIR")
                os.environ["TMPDIR"] = value
            self.callers += 1

    def leave(self) -> None:
        with self.lock:
            self.callers -= 1
            if self.callers:
                return
            if self.before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = self.before


_TMPDIR = _SharedVariable()


@dataclass(frozen=True, slots=True)
class _OwnFolder:
    path: Path
    kept: Path | None
    held: ExitStack
    process: int

    @property
    def code(self) -> Path:
        return self.path / "mlx" / _VERSION / "cpu"

    def leave(self) -> None:
        if os.getpid() != self.process:  # a forked child: the folder is its parent's
            return
        with suppress(OSError):
            self._keep_what_was_loaded()
        with suppress(OSError):
            self.held.close()

    def _keep_what_was_loaded(self) -> None:
        """What this process loaded is whole; a compiler that was killed leaves files that were not loaded."""
        if self.kept is None or not _MAPS.exists():
            return
        mapped = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text().splitlines()}
        for library in self.code.glob("lib*.so"):
            if str(library) in mapped and not (self.kept / library.name).exists():
                staged = self.kept / f".{unique_name()}"
                _link_or_copy(library, staged)
                staged.rename(self.kept / library.name)


@cache
def _folder_of(process: int) -> _OwnFolder:
    """Made once in a process, and once more in one that was forked."""
    held = ExitStack()
    path = held.enter_context(scratch_folder(FOLDER_PREFIX)).resolve()
    folder = _OwnFolder(path, _kept_code(), held, process)
    folder.code.mkdir(mode=0o700, parents=True)
    for library in folder.kept.glob("lib*.so") if folder.kept is not None else ():
        _link_or_copy(library, folder.code / library.name)
    atexit.register(folder.leave)
    return folder


def _kept_code() -> Path | None:
    """The folder of whole libraries; None where somebody else could write it."""
    user = Path(tempfile.gettempdir()) / f"{KEPT_PREFIX}{os.getuid()}"
    kept = user / _VERSION
    with suppress(OSError):
        user.mkdir(mode=0o700, exist_ok=True)
        kept.mkdir(mode=0o700, exist_ok=True)
    return kept if _is_private(user) and _is_private(kept) else None


def _is_private(folder: Path) -> bool:
    """Whether it is this user's folder, no link, and nobody else's to write."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
