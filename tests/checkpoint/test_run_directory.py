"""The folder of a run: refused early where it cannot serve, locked while it serves, swept of leftovers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.checkpoint import latest_valid_checkpoint, load_checkpoint, save_checkpoint
from qlora_hal.errors import ConfigError, OutputLockedError, StorageError
from qlora_hal.run.directory import RunDirectory, rehearsed, write_json_atomically
from qlora_hal.run.identity import config_hash
from tests.checkpoint.small_states import assert_same_state, small_state

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {"output_dir": "x", "training": {"learning_rate": 2e-4, "seed": None}, "lora": {"r": 8}}
CHANGED: dict[str, Any] = {**CONFIG, "training": {"learning_rate": 1e-4, "seed": None}, "lora": {"r": 16}}


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_a_new_run_records_its_configuration_and_what_it_resolves(tmp_path: Path) -> None:
    with RunDirectory.open_new(tmp_path / "a" / "run", config=CONFIG) as run:
        run.record({"backend": "cpu_torch"})
    content = json.loads((tmp_path / "a" / "run" / "run.json").read_bytes())
    assert content["config"] == CONFIG
    assert content["config_hash"] == config_hash({**CONFIG, "output_dir": "elsewhere"})
    assert content["config_hash"] != config_hash(CHANGED)
    assert content["backend"] == "cpu_torch"


def drop_the_power_to_override_permissions() -> None:
    # root ignores permission bits through CAP_DAC_OVERRIDE (1); with it out of the bounding set the next exec obeys.
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


OPEN_NEW = """
import json, sys
from qlora_hal.errors import QloraHalError
from qlora_hal.run.directory import RunDirectory
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    RunDirectory.open_new(sys.argv[1], config={})
except QloraHalError as error:
    print(json.dumps({**error.as_json(), "exit": error.exit_status}))
"""


@pytest.mark.fault("S12")
def test_a_folder_without_write_permission_is_refused_with_status_8(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    as_root = os.geteuid() == 0
    for target in (closed, closed / "run"):
        child = python(OPEN_NEW, target, preexec_fn=drop_the_power_to_override_permissions if as_root else None)
        error = json.loads(child.communicate(timeout=600)[0])
        assert (error["code"], error["exit"]) == ("QH-S12", 8)
        assert str(target) in error["message"]
        assert "permission" in error["message"]
    assert list(closed.iterdir()) == []


@pytest.mark.fault("S12")
def test_a_place_where_nothing_can_be_created_is_refused_with_status_8() -> None:
    with pytest.raises(StorageError, match="output folder") as refused:
        RunDirectory.open_new("/dev/null/run" if sys.platform != "linux" else "/proc/self/run", config=CONFIG)
    assert refused.value.code in ("QH-S12", "QH-S14")
    assert refused.value.exit_status == 8
    assert "resume" not in refused.value.fix, "there is no run yet"


@pytest.mark.fault("S09")
def test_a_folder_that_takes_no_byte_is_found_out_at_the_start(tmp_path: Path) -> None:
    child = python(OPEN_NEW, tmp_path / "run", "limit")
    error = json.loads(child.communicate(timeout=600)[0])
    assert (error["code"], error["exit"]) == ("QH-S09", 8)


@pytest.mark.fault("S13")
def test_another_runs_folder_is_refused_with_the_differing_keys_and_three_ways_out(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    save_checkpoint(tmp_path, small_state(5), keep=2)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="2 keys differ") as refused:
        RunDirectory.open_new(tmp_path, config={**CHANGED, "output_dir": "y"})
    assert (refused.value.code, refused.value.exit_status) == ("QH-S13", 2)
    assert "training.learning_rate (there 0.0002, now 0.0001)" in refused.value.message
    assert set(refused.value.context["differing"]) == {"lora.r", "training.learning_rate"}  # type: ignore[call-overload]
    for way_out in ("resume", "--overwrite", "another output_dir"):
        assert way_out in refused.value.fix
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.fault("S13")
def test_the_same_run_with_checkpoints_is_refused_and_resume_is_offered(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    save_checkpoint(tmp_path, small_state(5), keep=2)
    with pytest.raises(ConfigError, match=r"same configuration; it has 1 checkpoint\.") as refused:
        RunDirectory.open_new(tmp_path, config=CONFIG)
    assert "resume" in refused.value.fix
    with RunDirectory.open_existing(tmp_path):
        assert_same_state(load_checkpoint(latest_valid_checkpoint(tmp_path)[0]), small_state(5))


@pytest.mark.fault("S13")
def test_the_same_run_whose_checkpoints_were_set_aside_is_not_started_over(tmp_path: Path) -> None:
    """They may be whole: a file that could not be read is set aside like one that is damaged."""
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    saved = save_checkpoint(tmp_path, small_state(5), keep=2)
    aside = saved.rename(saved.with_name(".corrupt-step-00000005-0123abcd"))
    with pytest.raises(ConfigError, match="it has 0 checkpoints, and 1 that did not verify") as refused:
        RunDirectory.open_new(tmp_path, config=CONFIG)
    assert "resume" in refused.value.fix
    assert (aside / "MANIFEST.json").is_file()


@pytest.mark.fault("S13")
def test_a_run_that_never_saved_may_start_again_in_its_folder(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with RunDirectory.open_new(tmp_path, config={**CONFIG, "output_dir": "moved"}) as run:
        assert any("starting again" in note for note in run.notes)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.fault("S13")
def test_overwriting_removes_the_old_run_and_nothing_of_the_users(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    save_checkpoint(tmp_path, small_state(5), keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "loss.png").write_text("a picture that release 0.2 drew")
    with RunDirectory.open_new(tmp_path, config=CHANGED, overwrite=True) as run:
        assert run.content["config"] == CHANGED
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "loss.png").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.fault("S13")
@pytest.mark.parametrize("setting", ["path", "validation_path"])
@pytest.mark.parametrize("named", ["rows.jsonl", "."])
def test_what_a_new_run_is_to_read_is_not_removed_with_the_earlier_run(
    setting: str, named: str, tmp_path: Path
) -> None:
    """Rows that were given in memory are kept with their run, and a user may name that file the next time."""
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    config = {**CHANGED, "data": {setting: str(tmp_path / named)}}
    for overwrite in (True, False):
        with pytest.raises(ConfigError, match=rf"QH-S13.*data\.{setting} is .* part of the earlier run"):
            RunDirectory.open_new(tmp_path, config=config, overwrite=overwrite)
        with (
            pytest.raises(ConfigError, match="part of the earlier run"),
            rehearsed(tmp_path, config=config, overwrite=overwrite),
        ):
            pass
    assert (tmp_path / "rows.jsonl").read_text() == '{"text": "a"}\n'


@pytest.mark.fault("S13")
def test_files_that_no_run_wrote_are_not_even_overwritten_on_request(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"adapter but no run\.json") as refused:
        RunDirectory.open_new(tmp_path, config=CONFIG, overwrite=True)
    assert refused.value.code == "QH-S13"
    assert (tmp_path / "adapter").is_dir()


def a_file(path: Path) -> Path:
    path.write_text("data")
    return path


def below_a_file(path: Path) -> Path:
    return a_file(path) / "run"


def link_to_a_file(path: Path) -> Path:
    path.symlink_to(a_file(path.with_name("target")))
    return path


def loop_of_links(path: Path) -> Path:
    path.symlink_to(path.with_name("back"))
    path.with_name("back").symlink_to(path)
    return path


def dangling_link(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere"))
    return path


def below_a_dangling_link(path: Path) -> Path:
    return dangling_link(path) / "run"


def nul(path: Path) -> Path:
    return path / "a\0b"


@pytest.mark.fault("S14")
@pytest.mark.parametrize(
    "make", [a_file, below_a_file, link_to_a_file, loop_of_links, dangling_link, below_a_dangling_link, nul]
)
def test_an_output_path_that_is_no_folder_is_refused_and_shown(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError) as refused:
        RunDirectory.open_new(path, config=CONFIG)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S14", 8)
    assert str(path).replace("\0", "\\x00") in refused.value.message
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big disk")
    with RunDirectory.open_new(tmp_path / "out", config=CONFIG) as run:
        assert run.path == (tmp_path / "big disk").resolve()


HOLD = """
import sys
from qlora_hal.run.directory import RunDirectory
run = RunDirectory.open_new(sys.argv[1], config={})
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault("S15", "S16")
def test_a_held_folder_names_its_holder_and_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    holder = python(HOLD, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(OutputLockedError, match=f"held by pid {holder.pid} on host .* since 20") as refused:
        RunDirectory.open_existing(tmp_path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S15", 12)
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=600)
    with RunDirectory.open_existing(tmp_path) as run:
        assert any(f"from pid {holder.pid}" in note and "has ended" in note for note in run.notes)
    with RunDirectory.open_existing(tmp_path) as run:
        assert run.notes == []  # released in order


@pytest.mark.fault("S15")
def test_the_same_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with (
        RunDirectory.open_new(tmp_path, config=CONFIG) as run,
        pytest.raises(OutputLockedError, match=f"pid {os.getpid()}"),
    ):
        RunDirectory.open_existing(run.path)
    run.close()


@pytest.mark.fault("S16")
def test_a_reused_pid_does_not_keep_the_lock(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    owner = {"pid": os.getpid(), "host": os.uname().nodename, "since": "2020-01-01T00:00:00+00:00", "boot_id": "before"}
    write_json_atomically(tmp_path / "run.lock.json", owner)  # our own pid: certainly alive
    with RunDirectory.open_existing(tmp_path) as run:
        assert any("the machine was restarted" in note for note in run.notes)


@pytest.mark.fault("S17")
def test_a_lock_left_by_another_host_is_taken_only_on_request(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    owner = {"pid": 7, "host": "far-away", "since": "2020-01-01T00:00:00+00:00", "boot_id": "x"}
    write_json_atomically(tmp_path / "run.lock.json", owner)
    with pytest.raises(OutputLockedError, match="pid 7 on host far-away") as refused:
        RunDirectory.open_existing(tmp_path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S17", 12)
    with RunDirectory.open_existing(tmp_path, force_unlock=True) as run:
        assert "on request" in run.notes[0]


@pytest.mark.fault("S18", "S07")
def test_leftovers_are_swept_with_the_bytes_they_held_and_links_are_not_followed(tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"p" * 9000)
    RunDirectory.open_new(run_dir, config=CONFIG).close()
    path = save_checkpoint(run_dir, small_state(1), keep=2)
    (path.parent / ".staging-2-0123abcd").mkdir()
    (path.parent / ".staging-2-0123abcd" / "adapter_model.safetensors").write_bytes(b"x" * 1500)
    (path.parent / ".staging-2-0123abcd" / "link").symlink_to(outside)
    (path.parent / ".pruning-step-00000000-0123abcd").mkdir()
    (path.parent / ".tmp-metrics.jsonl-0123abcd").write_bytes(b"x" * 500)
    (path.parent / ".tmp-latest-0123abcd").symlink_to(outside)
    (path.parent / ".corrupt-step-00000000-0123abcd").mkdir()
    (run_dir / ".staging-adapter-0123abcd").mkdir()
    with RunDirectory.open_existing(run_dir) as run:
        assert "Removed 5 leftovers of interrupted saves, 2.0 kB freed." in run.notes
    assert sorted(p.name for p in path.parent.iterdir()) == [".corrupt-step-00000000-0123abcd", path.name]
    assert (outside / "precious").stat().st_size == 9000


def test_files_of_the_user_with_names_like_leftovers_stay(tmp_path: Path) -> None:
    theirs = [".tmp/mine.txt", ".tmpfile", ".tmp-notes", ".staging-area/site.html", ".replaced-by-me/x"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("theirs")
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    with RunDirectory.open_existing(tmp_path) as run:
        assert run.notes == []
    assert all((tmp_path / name).read_text() == "theirs" for name in theirs)


@pytest.mark.parametrize("name", ["adapter", "best_adapter"])
def test_adapter_that_a_crash_left_aside_is_put_back(tmp_path: Path, name: str) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    aside = tmp_path / f".replaced-{name}-0123abcd"
    aside.mkdir()
    (aside / "adapter_model.safetensors").write_bytes(b"whole")
    RunDirectory.open_existing(tmp_path).close()
    assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == b"whole"
    assert not aside.exists()


@pytest.mark.fault("S10")
def test_too_little_room_for_two_checkpoints_is_said_with_numbers(tmp_path: Path) -> None:
    with RunDirectory.open_new(tmp_path, config=CONFIG) as run:
        assert run.free_space_note(1000) is None
        note = run.free_space_note(10**15)  # 12 bytes each: no disk holds 24 petabytes
    assert note is not None
    assert note.startswith("QH-S10")
    assert "12000000.0 GB" in note


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"no run\.json") as refused:
            RunDirectory.open_existing(path)
        assert refused.value.code == "QH-S50"
    assert list(tmp_path.iterdir()) == []


REWRITE = """
import itertools, sys
from pathlib import Path
from qlora_hal.run.directory import write_json_atomically
for n in itertools.count():
    write_json_atomically(Path(sys.argv[1]), {"n": [n] * 20000})
    if n == 1: print("going", flush=True)
"""


def test_killing_a_process_that_rewrites_json_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for delay in (0.0, 0.013, 0.029, 0.05):
        child = python(REWRITE, path)
        assert child.stdout is not None
        assert child.stdout.readline() == "going\n"
        threading.Event().wait(delay)
        child.kill()
        child.communicate(timeout=600)
        assert len(set(json.loads(path.read_bytes())["n"])) == 1


@pytest.mark.fault("S13")
def test_an_attempt_that_ended_before_its_first_step_is_started_over_with_another_configuration(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "tokens").mkdir()
    with RunDirectory.open_new(tmp_path, config=CHANGED) as run:
        assert run.notes == ["An earlier attempt in this folder ended before its first step; starting again."]
        assert run.content["config"] == CHANGED
    assert not (tmp_path / "tokens").exists()


@pytest.mark.fault("S13")
def test_a_run_that_took_steps_without_a_checkpoint_is_not_told_to_resume(tmp_path: Path) -> None:
    RunDirectory.open_new(tmp_path, config=CONFIG).close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    one = {**CONFIG, "lora": {**CONFIG["lora"], "r": 99}}
    with pytest.raises(ConfigError, match=r"1 key differs: lora\.r") as refused:
        RunDirectory.open_new(tmp_path, config=one)
    assert "resume" not in refused.value.fix
    assert "--overwrite" in refused.value.fix


def test_a_rehearsal_judges_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    with rehearsed(tmp_path / "a" / "b", config=CONFIG) as scratch:
        assert scratch.is_dir()
        assert list(tmp_path.iterdir()) == []
    assert not scratch.exists()
    RunDirectory.open_new(tmp_path / "run", config=CONFIG).close()
    save_checkpoint(tmp_path / "run", small_state(5), keep=2)
    with pytest.raises(ConfigError, match="QH-S13"), rehearsed(tmp_path / "run", config=CHANGED):
        pass
    with rehearsed(tmp_path / "run", config=CHANGED, overwrite=True):
        assert (tmp_path / "run" / "checkpoints").is_dir()
    with pytest.raises(StorageError, match="QH-S14"), rehearsed(a_file(tmp_path / "file"), config=CONFIG):
        pass


@pytest.mark.fault("S14")
@pytest.mark.parametrize("reader", ["open_new", "rehearsed"])
@pytest.mark.parametrize("place", ["root", "home", "model", "data", "validation", "link to the model", "of others"])
def test_a_folder_that_is_not_for_runs_is_refused_and_left_as_it_is(
    place: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "model", "data", "validation", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "data"), "validation_path": str(tmp_path / "validation")},
    }
    output_dir, words = {
        "root": (Path("/"), "the root of the file system"),
        "home": (Path("~"), "the home folder"),
        "link to the model": (tmp_path / "link", "the folder of model.name_or_path"),
        "of others": (tmp_path / "shared", "a folder with files of other users (file.json among them)"),
    }.get(place, (tmp_path / place, f"the folder of {'model.name_or_path' if place == 'model' else 'data.'}"))
    if place == "of others":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    before = sorted(tmp_path.rglob("*"))

    def opened() -> None:
        if reader == "rehearsed":
            with rehearsed(output_dir, config=config):
                pass
        else:
            RunDirectory.open_new(output_dir, config=config).close()

    with pytest.raises(StorageError, match=re.escape(words)) as refused:
        opened()
    assert (refused.value.code, refused.value.where) == ("QH-S14", "output_dir")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_folder_in_such_a_place_is_taken(tmp_path: Path) -> None:
    """And one that holds files of one's own, which are left alone."""
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    config = {"model": {"name_or_path": str(tmp_path / "model")}}
    for output_dir in (tmp_path / "model" / "run", tmp_path):
        with rehearsed(output_dir, config=config):
            pass
        RunDirectory.open_new(output_dir, config=config).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
