"""What a rank other than the first has in the place of the run's folder, console and observers: nothing that anyone
reads. Rank 0 writes; the others do the same work on the same settings, and leave no trace."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qlora_hal.errors import ConfigError
from qlora_hal.report.console import RunConsole
from qlora_hal.report.run_file import read_run_file
from qlora_hal.run.directory import ADAPTER_FOLDER, BEST_ADAPTER_FOLDER, RUN_FILE, RunDirectory
from qlora_hal.run.lock import RunLock

PREFIX = "qlora-hal-rank-"


def silent_console() -> RunConsole:
    return RunConsole(silent=True, stream=io.StringIO(), environ={}, logger=None)


@contextmanager
def followed_new(config: Mapping[str, object]) -> Iterator[RunDirectory]:
    """A folder for a rank of a new run, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as scratch,
        RunDirectory.open_new(Path(scratch) / "run", config=config) as directory,
    ):
        yield directory


@contextmanager
def followed_existing(run_dir: Path) -> Iterator[tuple[RunDirectory, RunDirectory]]:
    """A folder for a rank of a run that goes on, with the adapters of `run_dir`, and `run_dir` itself, to be read.

    Raises ConfigError QH-S50 where this machine has no such folder.
    """
    if not (run_dir / RUN_FILE).is_file():
        raise ConfigError(
            "QH-S50",
            f"{run_dir} has no {RUN_FILE} on this machine; the run's folder is expected on every machine.",
            where=str(run_dir),
            fix="Put the folder on storage that all machines share, or copy it to each of them.",
        )
    content = read_run_file(run_dir)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as scratch:
        own = Path(scratch) / "run"
        own.mkdir()
        for name in (RUN_FILE, ADAPTER_FOLDER, BEST_ADAPTER_FOLDER):
            _copied(run_dir / name, own / name)
        with RunDirectory(own, RunLock.take(own), content) as directory:
            yield directory, RunDirectory(run_dir, None, content)


def _copied(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)
