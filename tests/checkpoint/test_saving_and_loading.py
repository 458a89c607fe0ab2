"""What is saved comes back bit for bit; what was altered does not come back at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_hal.adapter import read_adapter, read_provenance
from qlora_hal.checkpoint import checkpoints, latest_valid_checkpoint, load_checkpoint, save_checkpoint
from qlora_hal.contract.values import OptimizerSnapshot
from qlora_hal.errors import CheckpointError, ConfigError, QloraHalError, StorageError
from qlora_hal.files import strict_json
from tests.checkpoint.small_states import assert_same_arrays, assert_same_state, small_state

FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints(run_dir)]


def test_a_state_comes_back_bit_for_bit(run_dir: Path) -> None:
    state = small_state(7)
    path = save_checkpoint(run_dir, state, keep=2)
    assert_same_state(load_checkpoint(path), state)
    assert path == run_dir / "checkpoints" / "step-00000007"
    assert os.readlink(run_dir / "latest") == "checkpoints/step-00000007"


def test_special_floats_and_odd_layouts_keep_their_bits(run_dir: Path) -> None:
    state = small_state(1)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32)
    native: dict[str, npt.NDArray[Any]] = {
        "odd": odd,
        "transposed": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "strided": np.arange(10, dtype=np.float64)[::3],
        "big endian": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 4), dtype=np.float16),
        "flag": np.array(True),
    }
    snapshot = OptimizerSnapshot(1, state.optimizer.moments, native=native)
    saved = type(state)(1, 0.5, 10, state.adapter, snapshot)
    found = load_checkpoint(save_checkpoint(run_dir, saved, keep=2)).optimizer.native
    native["big endian"] = native["big endian"].astype("<i4")
    assert_same_arrays(found, native)


def test_a_checkpoint_is_an_adapter_folder_too(run_dir: Path) -> None:
    state = small_state(3)
    path = save_checkpoint(run_dir, state, keep=2)
    assert_same_arrays(read_adapter(path).tensors, state.adapter.tensors)
    assert read_provenance(path)["base_fingerprint"] == "ab" * 32


def test_equal_states_give_equal_bytes(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = save_checkpoint(run_dir, small_state(3), keep=2)
    second = save_checkpoint(other, small_state(3), keep=2)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_files_get_their_mode_from_the_umask(run_dir: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save_checkpoint(run_dir, small_state(1), keep=2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_older_checkpoints_go_but_never_the_protected_or_the_broken(run_dir: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(run_dir, small_state(step), keep=10)
    (run_dir / "checkpoints" / "step-00000003" / "optimizer.safetensors").unlink()
    save_checkpoint(run_dir, small_state(4), keep=2, protect={1})
    assert steps(run_dir) == [1, 2, 3, 4]  # 3 is broken and does not count, so 2 and 4 are the newest two
    save_checkpoint(run_dir, small_state(5), keep=2, protect={1})
    assert steps(run_dir) == [1, 3, 4, 5]


def test_keeping_fewer_than_two_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2") as refused:
        save_checkpoint(run_dir, small_state(1), keep=1)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S54", 2)


@pytest.mark.fault("S08")
def test_saving_a_step_again_replaces_it_as_a_whole(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(3, variant=0), keep=2)
    path = save_checkpoint(run_dir, small_state(3, variant=1), keep=2)
    assert_same_state(load_checkpoint(path), small_state(3, variant=1))
    assert [p.name for p in path.parent.iterdir()] == ["step-00000003"]


@pytest.mark.fault("S08")
def test_a_half_old_folder_of_the_same_step_is_put_aside_not_mixed(run_dir: Path) -> None:
    path = save_checkpoint(run_dir, small_state(3, variant=0), keep=2)
    (path / "optimizer.safetensors").unlink()
    save_checkpoint(run_dir, small_state(3, variant=1), keep=2)
    assert_same_state(load_checkpoint(path), small_state(3, variant=1))
    assert len(list(path.parent.glob(".corrupt-step-00000003-*"))) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: {2, 3}}])
def test_a_loop_state_without_json_form_is_refused_before_anything_is_written(run_dir: Path, value: Any) -> None:
    state = small_state(1)
    broken = type(state)(1, 0.0, 0, state.adapter, state.optimizer, loop={"best": [0.5, value]})
    with pytest.raises(CheckpointError, match=r"loop\.best\[1\]") as refused:
        save_checkpoint(run_dir, broken, keep=2)
    assert refused.value.code == "QH-C52"
    assert list(run_dir.iterdir()) == []


def cut_last_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def cut_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero_tail(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))


def flip_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) * 3 // 4] ^= 0x10
    file.write_bytes(bytes(raw))


def replace_by_link(file: Path) -> None:
    elsewhere = file.parent.parent.parent.parent / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut by one byte": (cut_last_byte, r"has \d+ bytes, \d+ were written"),
    "cut in half": (cut_half, r"has \d+ bytes, \d+ were written"),
    "zero tail": (zero_tail, "does not match its hash"),
    "one bit": (flip_bit, "does not match its hash"),
    "missing": (Path.unlink, "is missing"),
    "a link to the same bytes": (replace_by_link, "cannot be read"),
}


@pytest.mark.fault("C01", "C02", "C03", "C04", "X06")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_step_before_is_taken(run_dir: Path, name: str, damage: str) -> None:
    act, words = DAMAGE[damage]
    save_checkpoint(run_dir, small_state(1), keep=2)
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    act(newest / name)
    with pytest.raises(CheckpointError, match=f"{name} {words}") as refused:
        load_checkpoint(newest)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C04", 9)
    found, notes = latest_valid_checkpoint(run_dir)
    assert found.name == "step-00000001"
    assert len(notes) == 1
    assert notes[0].startswith(f"Skipped step-00000002: {name} ")
    assert "kept as .corrupt-step-00000002-" in notes[0]
    assert_same_state(load_checkpoint(found), small_state(1))


@pytest.mark.fault("C04")
@pytest.mark.parametrize("act", [cut_last_byte, flip_bit, zero_tail, Path.unlink])
def test_without_an_intact_manifest_a_folder_is_no_checkpoint(run_dir: Path, act: Any) -> None:
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    act(newest / "MANIFEST.json")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json") as refused:
        latest_valid_checkpoint(run_dir)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C04", 9)
    assert "step-00000002" in refused.value.context["failures"]  # type: ignore[operator]
    assert len(list(newest.parent.glob(".corrupt-*"))) == 1


@pytest.mark.fault("C04")
def test_a_lost_optimizer_offers_the_weights_alone_only_when_they_are_whole(run_dir: Path) -> None:
    path = save_checkpoint(run_dir, small_state(2), keep=2)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert "generate --adapter" in refused.value.fix
    flip_bit(path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert "generate --adapter" not in refused.value.fix


def test_a_run_without_any_checkpoint_says_so(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint") as refused:
        latest_valid_checkpoint(run_dir)
    assert refused.value.exit_status == 9
    assert refused.value.cause == "The run stopped before its first save."


@pytest.fixture
def unreadable_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose two checkpoints are whole, and could not be read when it was resumed, as when a server is away."""
    for step in (1, 2):
        save_checkpoint(run_dir, small_state(step), keep=2)

    def away(path: Path) -> object:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("qlora_hal.checkpoint.manifest.open_regular", away)
        with pytest.raises(CheckpointError, match="Input/output error") as refused:
            latest_valid_checkpoint(run_dir)
    assert "resume again when they can" in refused.value.fix
    assert steps(run_dir) == []
    return run_dir


@pytest.mark.fault("C04")
def test_a_whole_checkpoint_that_was_set_aside_is_taken_back_where_no_other_verifies(unreadable_once: Path) -> None:
    path, notes = latest_valid_checkpoint(unreadable_once)
    assert path.name == "step-00000002"
    assert_same_state(load_checkpoint(path), small_state(2))
    assert notes == ["step-00000002, which an earlier start set aside, verifies; it is used."]


def test_a_checkpoint_that_was_set_aside_does_not_stand_before_one_that_was_not(unreadable_once: Path) -> None:
    save_checkpoint(unreadable_once, small_state(1), keep=2)
    assert latest_valid_checkpoint(unreadable_once) == (unreadable_once / "checkpoints" / "step-00000001", [])


def test_what_was_set_aside_and_does_not_verify_is_named_at_each_start(run_dir: Path) -> None:
    flip_bit(save_checkpoint(run_dir, small_state(1), keep=2) / "optimizer.safetensors")
    for kept in ("step-00000001", r"\.corrupt-step-00000001-[0-9a-f]+"):
        with pytest.raises(CheckpointError, match=rf"\(1 tried\)\. {kept}: optimizer.safetensors does not") as refused:
            latest_valid_checkpoint(run_dir)
        assert refused.value.cause == ""


def test_one_that_was_set_aside_under_another_step_is_not_taken_back(run_dir: Path) -> None:
    path = save_checkpoint(run_dir, small_state(4), keep=2)
    path.rename(path.with_name("step-00000009"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="its manifest is of step 4, not 9"):
            latest_valid_checkpoint(run_dir)


def test_a_reader_beside_a_live_run_takes_nothing_back(unreadable_once: Path) -> None:
    with pytest.raises(CheckpointError, match="0 tried"):
        latest_valid_checkpoint(unreadable_once, set_aside_broken=False)
    assert steps(unreadable_once) == []


@pytest.mark.fault("C04")
def test_a_state_of_another_step_than_its_manifest_is_refused(run_dir: Path) -> None:
    path = save_checkpoint(run_dir, small_state(3), keep=2)
    raw = strict_json.encode({**json.loads((path / "trainer_state.json").read_bytes()), "step": 1})
    (path / "trainer_state.json").write_bytes(raw)
    files = json.loads((path / "MANIFEST.json").read_bytes())["files"]
    files["trainer_state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite_manifest(path, files=files)
    with pytest.raises(CheckpointError, match="its manifest is of step 3, not 1"):
        load_checkpoint(path)


@pytest.mark.fault("S25")
def test_the_newest_is_the_highest_step_not_the_latest_file_time(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(1), keep=2)
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    for file in (newest, *newest.iterdir()):
        os.utime(file, (0, 0))
    assert latest_valid_checkpoint(run_dir)[0] == newest


def test_a_reader_beside_a_live_run_renames_nothing(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(1), keep=2)
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    flip_bit(newest / "optimizer.safetensors")
    found, notes = latest_valid_checkpoint(run_dir, set_aside_broken=False)
    assert found.name == "step-00000001"
    assert newest.is_dir()
    assert len(notes) == 1


@pytest.mark.fault("C13")
def test_a_checkpoint_of_another_schema_is_left_alone_and_named(run_dir: Path) -> None:
    save_checkpoint(run_dir, small_state(1), keep=2)
    newest = save_checkpoint(run_dir, small_state(2), keep=2)
    rewrite_manifest(newest, schema_version=2)
    found, notes = latest_valid_checkpoint(run_dir)
    assert found.name == "step-00000001"
    assert "schema version 2" in notes[0]
    assert newest.is_dir()
    with pytest.raises(CheckpointError, match="schema version 2") as refused:
        load_checkpoint(newest)
    assert refused.value.code == "QH-C13"


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """A manifest that verifies: what a hostile author, not an accident, would write."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    del manifest["manifest_sha256"]
    manifest |= changes
    own = hashlib.sha256(strict_json.encode(manifest)).hexdigest()
    (folder / "MANIFEST.json").write_bytes(strict_json.encode({**manifest, "manifest_sha256": own}))


@pytest.mark.fault("X06")
@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "..", "", "x" * 300, "nul\0"])
def test_a_manifest_cannot_point_outside_its_folder(run_dir: Path, name: str) -> None:
    path = save_checkpoint(run_dir, small_state(1), keep=2)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    rewrite_manifest(path, files={**manifest["files"], name: {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match="impossible file"):
        load_checkpoint(path)


@pytest.mark.fault("X06")
def test_links_among_the_checkpoints_are_not_followed_out(run_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    genuine = save_checkpoint(outside, small_state(9), keep=2)
    save_checkpoint(run_dir, small_state(1), keep=2)
    (run_dir / "checkpoints" / "step-00000009").symlink_to(genuine)
    assert latest_valid_checkpoint(run_dir)[0].name == "step-00000001"
    save_checkpoint(run_dir, small_state(9, variant=1), keep=2)  # puts the link aside, not its target
    assert_same_state(load_checkpoint(genuine), small_state(9))
    for step in (10, 11, 12):
        save_checkpoint(run_dir, small_state(step), keep=2)
    assert_same_state(load_checkpoint(genuine), small_state(9))


@pytest.mark.fault("X06", "S14")
def test_a_link_in_place_of_the_checkpoints_folder_is_refused(run_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run_dir / "checkpoints").symlink_to(outside)
    with pytest.raises(StorageError, match="symbolic link") as refused:
        save_checkpoint(run_dir, small_state(1), keep=2)
    assert (refused.value.code, refused.value.exit_status) == ("QH-S14", 8)
    assert list(outside.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_value_in_a_verifying_checkpoint_gives_only_our_errors(run_dir: Path, data: st.DataObject) -> None:
    path = save_checkpoint(run_dir, small_state(1), keep=2)
    document = json.loads((path / "trainer_state.json").read_bytes())
    place = data.draw(st.sampled_from([document, document["adapter"], document["optimizer"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    raw = strict_json.encode(document)
    (path / "trainer_state.json").write_bytes(raw)
    files = json.loads((path / "MANIFEST.json").read_bytes())["files"]
    files["trainer_state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite_manifest(path, files=files, **data.draw(st.dictionaries(st.sampled_from(["step", "summary"]), JSON)))
    try:
        state = load_checkpoint(path)
    except QloraHalError as refused:
        code = refused.code
    else:
        assert isinstance(state.adapter.config.r, int)
        assert isinstance(state.loop, dict)
        return
    assert code == "QH-C04"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_bytes_give_only_our_errors(run_dir: Path, raw: bytes) -> None:
    path = save_checkpoint(run_dir, small_state(1), keep=2)
    (path / "MANIFEST.json").write_bytes(raw)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert refused.value.code in ("QH-C04", "QH-C13")
