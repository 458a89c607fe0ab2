"""A lock or a log that is gone while its run lives is noticed; and of a run that is gone, the next command says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_hal.checkpoint import save_checkpoint
from qlora_hal.errors import ConfigError, OutputLockedError
from qlora_hal.report.metrics import MetricsFile, read_metrics
from qlora_hal.run.directory import RunDirectory
from qlora_hal.run.lock import LOCK_FILE, OWNER_FILE, RunLock, is_held, memory_kills
from tests.checkpoint.small_states import small_state

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {"output_dir": "x", "training": {"seed": 1}}
HOLDING = """
import sys
from pathlib import Path
from qlora_hal.run.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
EATING = HOLDING.replace(
    "sys.stdin.read()",
    "open(sys.argv[2], 'w').write('0')\neaten = [b'x' * 1_000_000 for _ in range(4000)]",
)


def holder(folder: Path, code: str = HOLDING, *arguments: str) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


# while it runs ------------------------------------------------------------------------------------------------------
def test_a_lock_that_is_where_it_was_is_nothing_to_speak_of(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    assert lock.keep() == ""
    lock.release()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process began apart from the clock")
@pytest.mark.parametrize("seconds", [-86400, 3600, 86400])
def test_a_clock_that_was_set_does_not_make_a_live_run_look_gone(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells when a process began by the clock as it is set now; a machine without a battery sets it late."""
    lock = RunLock.take(tmp_path)
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + seconds)
    assert is_held(tmp_path) is True
    owner = json.loads((tmp_path / OWNER_FILE).read_text())
    (tmp_path / OWNER_FILE).write_text(json.dumps({**owner, "started": owner["started"] - 1}))
    assert is_held(tmp_path) is False  # another process by now has the number
    lock.release()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_was_removed_is_taken_again_and_keeps_others_out(tmp_path: Path, replaced: bool) -> None:
    lock = RunLock.take(tmp_path)
    for name in (LOCK_FILE, OWNER_FILE):
        (tmp_path / name).unlink()
    if replaced:
        (tmp_path / LOCK_FILE).touch()
    assert lock.keep() == f"{LOCK_FILE} was removed or replaced while this run held it; it is taken again"
    assert lock.keep() == ""
    with pytest.raises(OutputLockedError, match=f"pid {os.getpid()}"):
        RunLock.take(tmp_path)
    lock.release()
    RunLock.take(tmp_path).release()


@pytest.mark.fault("S15")
def test_a_run_whose_lock_another_has_by_now_saves_nothing_more(tmp_path: Path) -> None:
    with RunDirectory.open_new(tmp_path, config=CONFIG) as run:
        (tmp_path / LOCK_FILE).unlink()
        other = holder(tmp_path)
        with pytest.raises(OutputLockedError, match="was removed while this run held it") as refused:
            run.keep_lock()
        assert (refused.value.code, refused.value.exit_status) == ("QH-S15", 12)
        assert f"pid {other.pid}" in refused.value.message
    assert (tmp_path / OWNER_FILE).exists()  # the other's, which this one must not take along
    other.kill()
    other.communicate()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsFile]:
    with MetricsFile(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1})
        log.append({"step": 2})
        yield log


def test_a_log_that_was_removed_is_there_again_with_all_its_lines(log: MetricsFile) -> None:
    log.path.unlink()
    assert "was removed while this run wrote it" in log.restored()
    log.append({"step": 3})
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3]
    assert log.restored() == ""


def test_a_log_that_an_editor_replaced_is_there_again_and_so_is_what_was_put_in_its_place(log: MetricsFile) -> None:
    other = log.path.with_name("edited")
    other.write_text("theirs\n")
    other.replace(log.path)
    assert "was replaced by another file, kept as .damaged-metrics.jsonl-" in log.restored()
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2]
    assert [path.read_text() for path in log.path.parent.glob(".damaged-*")] == ["theirs\n"]


def test_a_log_that_lost_its_name_twice_is_written_again_twice(log: MetricsFile) -> None:
    for step in (3, 4):
        log.path.unlink()
        assert log.restored()
        log.append({"step": step})
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4]


def test_a_log_in_its_place_is_nothing_to_speak_of(log: MetricsFile) -> None:
    assert log.restored() == ""


# when it is gone ----------------------------------------------------------------------------------------------------
def left_behind(folder: Path, **changes: object) -> None:
    """The traces of a process that was killed, with changes."""
    child = holder(folder)
    child.kill()
    child.communicate()
    owner = json.loads((folder / OWNER_FILE).read_text())
    (folder / OWNER_FILE).write_text(json.dumps({**owner, **changes}))


@pytest.mark.fault("S16", "S24")
@pytest.mark.skipif(memory_kills() is None, reason="this system does not count what its memory killer ends")
@pytest.mark.parametrize(
    ("earlier", "said"),
    [
        (0, "It was killed (kill -9), or it crashed; the kernel's memory killer has ended no process since then."),
        (1, "The kernel's memory killer has ended a process on this machine since then, most likely this one: lower"),
        (3, "has ended 3 processes on this machine since then, most likely this one: lower training.per_device"),
    ],
)
def test_a_run_that_is_gone_is_told_with_what_likely_ended_it(tmp_path: Path, earlier: int, said: str) -> None:
    left_behind(tmp_path, memory_kills=(memory_kills() or 0) - earlier)
    lock = RunLock.take(tmp_path)
    assert lock.note is not None
    assert said in lock.note
    lock.release()


@pytest.mark.parametrize("unknown", [None, "many", {}])
def test_where_memory_kills_are_not_counted_both_causes_are_named(tmp_path: Path, unknown: object) -> None:
    left_behind(tmp_path, memory_kills=unknown)
    lock = RunLock.take(tmp_path)
    assert lock.note is not None
    assert "It was killed (by kill -9, or by the system when memory ran out), or it crashed." in lock.note
    lock.release()


def test_a_command_that_is_refused_leaves_the_traces_for_the_next_one_and_tells_them(tmp_path: Path) -> None:
    with RunDirectory.open_new(tmp_path, config=CONFIG):
        save_checkpoint(tmp_path, small_state(1), keep=2)
    left_behind(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match="QH-S13") as refused:
            RunDirectory.open_new(tmp_path, config={**CONFIG, "training": {"seed": 2}})
        assert "that process has ended without releasing it" in refused.value.cause
    with RunDirectory.open_existing(tmp_path) as run:
        assert "that process has ended without releasing it" in run.notes[0]
    with RunDirectory.open_existing(tmp_path) as run:
        assert run.notes == []


MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group of 60 MB; needs root and control groups of version 1."""
    group = MEMORY_GROUPS / f"qlora-hal-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("60000000")
    except OSError:
        pytest.skip("no control group for memory can be made here")
    yield group
    group.rmdir()


@pytest.mark.fault("S24")
def test_a_run_that_the_kernels_memory_killer_ended_is_told_as_that(tmp_path: Path, small_memory: Path) -> None:
    child = holder(tmp_path, EATING, str(small_memory / "cgroup.procs"))
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    lock = RunLock.take(tmp_path)
    assert lock.note is not None
    assert "most likely this one: lower training.per_device_train_batch_size" in lock.note
    lock.release()
