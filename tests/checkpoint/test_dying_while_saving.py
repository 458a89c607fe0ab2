"""Whatever happens inside a save, the next reader finds a whole state that is not older than the last one reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_hal.checkpoint import checkpoints, faults, latest_valid_checkpoint, load_checkpoint, save_checkpoint
from qlora_hal.checkpoint.faults import FAULT_POINTS, FILE_POINTS, InjectedFault
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.files import durable
from qlora_hal.run.directory import RunDirectory
from tests.checkpoint.small_states import assert_same_state, small_state

ROOT = Path(__file__).parents[2]
FILES_OF_A_SAVE = 6  # tensors, adapter config, provenance, optimizer, state, manifest

KILLS = [f"{name}:kill" for name in FAULT_POINTS] + [
    f"ckpt.inside_file_write:kill@{number}" for number in range(2, FILES_OF_A_SAVE + 1)
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with RunDirectory.open_new(folder, config={"training": {"seed": 1}}):
        return folder


def arm(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    faults.forget_passes()
    monkeypatch.setenv(faults.ENVIRONMENT_VARIABLE, fault)


def recovered(run_dir: Path) -> tuple[int, int]:
    """Step and variant of what a resume finds, after checking every bit of it and that saving goes on."""
    with RunDirectory.open_existing(run_dir):
        path, _ = latest_valid_checkpoint(run_dir)
        state = load_checkpoint(path)
        variant = state.loop["variant"]
        assert isinstance(variant, int)
        assert_same_state(state, small_state(state.step, variant))
        leftovers = [
            p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith(("step-", ".corrupt"))
        ]
        assert leftovers == []
        for _, older in checkpoints(run_dir):
            load_checkpoint(older)  # nothing half-deleted keeps the name of a checkpoint
        save_checkpoint(run_dir, small_state(4), keep=2)
        assert latest_valid_checkpoint(run_dir)[0].name == "step-00000004"
    return state.step, variant


@pytest.mark.fault("S01", "S02", "S03", "S04", "S05", "S06", "S07", "S08")
@pytest.mark.parametrize("fault", KILLS)
def test_kill_at_every_point_leaves_a_whole_checkpoint(run_dir: Path, fault: str) -> None:
    child = subprocess.run(
        [sys.executable, str(ROOT / "tests/checkpoint/saving_child.py"), str(run_dir), fault],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=600,
    )
    assert child.returncode == -9, child.stderr
    reported = [tuple(map(int, line.split()[1:])) for line in child.stdout.splitlines()]
    found = recovered(run_dir)
    assert not list((run_dir / "checkpoints").glob(".corrupt-*"))  # a kill leaves nothing that looks like a checkpoint
    begun = {2: (3, 0), 3: (3, 1)}[len(reported)]
    assert found in (reported[-1], begun)
    if fault.startswith(("ckpt.after_rename", "ckpt.before_prune", "ckpt.inside_prune", "ckpt.after_prune")):
        assert found == begun  # the rename is the moment of truth
    else:
        assert found == reported[-1]


@pytest.mark.fault("S01")
def test_a_resume_says_which_save_did_not_finish_and_how_much_is_redone(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(200), keep=2)
    (run_dir / "checkpoints" / ".staging-300-0123abcd").mkdir()
    _, notes = latest_valid_checkpoint(run_dir)
    assert notes == ["Resumed from step 200: the save of step 300 did not finish; 100 steps are redone."]
    with RunDirectory.open_existing(run_dir) as run:
        assert run.unfinished_saves == (300,)


@pytest.mark.fault("S08")
@pytest.mark.parametrize("newer", ["absent", "broken", "sound"])
def test_a_checkpoint_moved_aside_for_a_newer_save_comes_back_unless_that_save_is_sound(
    run_dir: Path, newer: str
) -> None:
    older = save_checkpoint(run_dir, small_state(3, variant=0), keep=2)
    older.rename(older.with_name(".replaced-step-00000003-0123abcd"))
    if newer != "absent":
        save_checkpoint(run_dir, small_state(3, variant=1), keep=2)
    if newer == "broken":
        (older / "optimizer.safetensors").unlink()
    found, _ = latest_valid_checkpoint(run_dir)
    assert_same_state(load_checkpoint(found), small_state(3, variant=int(newer == "sound")))


@pytest.mark.parametrize("name", FAULT_POINTS)
def test_an_unforeseen_exception_at_every_point_keeps_the_last_state(
    run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(run_dir, small_state(step), keep=3)
    arm(monkeypatch, f"{name}:raise")
    with pytest.raises(InjectedFault):
        save_checkpoint(run_dir, small_state(3, variant=1), keep=2)
    monkeypatch.delenv(faults.ENVIRONMENT_VARIABLE)
    assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".staging")]
    assert recovered(run_dir) in ((3, 0), (3, 1))


@pytest.mark.fault("S09")
@pytest.mark.parametrize("name", [name for name in FAULT_POINTS if "prune" not in name and "replacing" not in name])
def test_a_full_disk_at_every_point_of_the_save_is_reported_with_the_safe_step(
    run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(run_dir, small_state(1), keep=2)
    arm(monkeypatch, f"{name}:enospc")
    with pytest.raises(
        StorageError, match=r"Disk full while writing step 2: needs \d+ bytes, \d+ free .* is safe"
    ) as full:
        save_checkpoint(run_dir, small_state(2), keep=2)
    assert (full.value.code, full.value.exit_status) == ("QH-S09", 8)
    assert full.value.cause.startswith("ENOSPC")
    monkeypatch.delenv(faults.ENVIRONMENT_VARIABLE)
    assert recovered(run_dir)[0] == (2 if name == "ckpt.after_rename" else 1)


@pytest.mark.fault("C01", "C03")
@pytest.mark.parametrize("action", ["truncate", "bitflip"])
@pytest.mark.parametrize("name", sorted(FILE_POINTS))
def test_bytes_that_rot_during_a_save_are_found_by_the_reader(
    run_dir: Path, name: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(run_dir, small_state(1), keep=2)
    arm(monkeypatch, f"{name}:{action}")
    save_checkpoint(run_dir, small_state(2), keep=2)
    monkeypatch.delenv(faults.ENVIRONMENT_VARIABLE)
    assert recovered(run_dir)[0] == 1
    assert len(list((run_dir / "checkpoints").glob(".corrupt-step-00000002-*"))) == 1


FULL_DISK_CHILD = """
import json, resource, sys
from pathlib import Path
from qlora_hal.checkpoint import save_checkpoint
from qlora_hal.errors import QloraHalError
from tests.checkpoint.small_states import small_state
run_dir = Path(sys.argv[1])
save_checkpoint(run_dir, small_state(1), keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores SIGXFSZ, so writes fail with EFBIG
try:
    save_checkpoint(run_dir, small_state(2, width=40), keep=2)
except QloraHalError as error:
    print(json.dumps({**error.as_json(), "exit": error.exit_status}))
"""


@pytest.mark.fault("S09", "S11")
def test_a_real_write_limit_in_the_middle_of_a_file_leaves_the_older_checkpoint_intact(run_dir: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK_CHILD, str(run_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    assert '"code": "QH-S09"' in child.stdout
    assert '"exit": 8' in child.stdout
    assert "EFBIG" in child.stdout
    assert "Step 1 is safe." in child.stdout
    assert recovered(run_dir)[0] == 1


@pytest.mark.parametrize("request_", ["nowhere:kill", "ckpt.after_rename:explode", "ckpt.after_rename:bitflip"])
def test_a_misspelled_fault_is_refused_instead_of_testing_nothing(
    run_dir: Path, request_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(monkeypatch, request_)
    with pytest.raises(ConfigError, match="QLORA_HAL_FAULTS") as refused:
        save_checkpoint(run_dir, small_state(1), keep=2)
    assert refused.value.code == "QH-S52"


def test_losing_power_at_any_moment_leaves_a_whole_checkpoint(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay every prefix of the flush and rename trace; bytes that were not flushed by then become zeros."""
    save_checkpoint(run_dir, small_state(1), keep=2)
    trace: list[tuple[str, int]] = []  # ("flush" or "rename", inode)
    flush, rename = durable.flush_to_medium, os.rename

    def traced_flush(descriptor: int) -> None:
        trace.append(("flush", os.fstat(descriptor).st_ino))
        flush(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        trace.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(durable, "flush_to_medium", traced_flush)
    monkeypatch.setattr(os, "rename", traced_rename)
    saved = save_checkpoint(run_dir, small_state(2), keep=2)
    monkeypatch.undo()
    whole = {path: path.read_bytes() for path in saved.iterdir()}
    inodes = {path: path.stat().st_ino for path in whole}
    parent = saved.parent.stat().st_ino
    assert trace[-1] == ("flush", parent)
    assert {inode for kind, inode in trace if kind == "flush"} >= {*inodes.values(), saved.stat().st_ino}

    outcomes = set()
    for length in range(len(trace) + 1):
        done = trace[:length]
        name = "step-00000002" if any(kind == "rename" for kind, _ in done) else ".staging-2-00000000"
        for path in saved.parent.glob("*2-0*"):
            path.rename(saved.parent / "work")
        for path in saved.parent.glob("step-00000002"):
            path.rename(saved.parent / "work")
        for path, content in whole.items():
            kept = ("flush", inodes[path]) in done
            (saved.parent / "work" / path.name).write_bytes(content if kept else bytes(len(content)))
        (saved.parent / "work").rename(saved.parent / name)
        found, _ = latest_valid_checkpoint(run_dir, set_aside_broken=False)
        state = load_checkpoint(found)
        assert_same_state(state, small_state(state.step))
        assert state.step == (2 if name.startswith("step") else 1)
        outcomes.add(state.step)
    assert outcomes == {1, 2}
