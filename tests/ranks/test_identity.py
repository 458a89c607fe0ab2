"""Which rank a process is, by an environment that may be odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError
from qlora_hal.ranks.identity import (
    is_following,
    is_restart,
    launch_here,
    may_be_restart,
    rank_here,
    seed_of_ranks,
    world_here,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_nothing_in_the_environment_is_one_process() -> None:
    assert world_here({}) == World(0, 1, 0)
    assert not is_following({})


def test_torchrun_tells_rank_size_and_place_on_the_host() -> None:
    assert world_here(TORCHRUN) == World(3, 8, 1)
    assert world_here({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, 1)
    assert world_here({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}) == World(3, 8, 1, 4)
    assert is_following(TORCHRUN)
    assert not is_following({**TORCHRUN, "RANK": "0"})


def test_a_host_shares_its_memory_among_its_own_ranks_or_among_all_where_none_are_counted() -> None:
    assert world_here({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}).most_on_host == 4
    assert world_here(TORCHRUN).most_on_host == 8
    assert World().most_on_host == 1


@pytest.mark.parametrize("left_over", [{"RANK": "0"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "4"}])
def test_a_variable_alone_that_says_one_process_is_one_process(left_over: dict[str, str]) -> None:
    assert world_here(left_over) == World()


@pytest.mark.fault("R04")
@pytest.mark.parametrize(
    "odd",
    [
        {"RANK": "two", "WORLD_SIZE": "8"},
        {"RANK": "", "WORLD_SIZE": "8"},
        {"RANK": "8", "WORLD_SIZE": "8"},
        {"RANK": "-1", "WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere/hosts.json"},
    ],
)
def test_variables_that_contradict_one_another_are_told(odd: dict[str, str]) -> None:
    with pytest.raises(BackendError, match="The environment names no rank") as caught:
        world_here(odd)
    assert caught.value.code == "QH-R04"
    assert not is_following(odd), "it has to speak"


@pytest.mark.fault("R04")
@pytest.mark.parametrize("content", ["{", "{}", "3", "\xff"])
def test_a_file_of_hosts_that_is_none_is_told(content: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(BackendError, match="MLX_HOSTFILE") as caught:
        world_here({"MLX_RANK": "0", "MLX_HOSTFILE": str(file)})
    assert caught.value.code == "QH-R04"


def test_mlx_tells_its_rank_and_a_file_of_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"]]')
    assert world_here({"MLX_RANK": "1", "MLX_HOSTFILE": str(file)}) == World(1, 2, 0, 1), "the first of its own host"
    file.write_text("")
    assert world_here({"MLX_RANK": "0", "MLX_HOSTFILE": str(file)}) == World(), "as mlx.launch leaves it for one host"


def test_ranks_without_a_seed_make_the_same_one_of_what_torchrun_gave_them() -> None:
    meeting = {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    drawn = seed_of_ranks(None, {**meeting, "RANK": "0"})
    assert drawn == seed_of_ranks(None, {**meeting, "RANK": "1"})
    assert drawn != seed_of_ranks(None, {**meeting, "TORCHELASTIC_RUN_ID": "b"})
    assert 0 <= drawn < 2**31
    assert seed_of_ranks(7, meeting) == 7


def test_a_launch_is_the_same_for_each_of_its_starts_and_for_no_other() -> None:
    started = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "abc"}
    again = {**started, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert launch_here(started) == launch_here(again) == "abc"
    assert (is_restart(started), is_restart(again)) == (False, True)
    assert launch_here({}) == "", "nothing starts it anew"
    unnamed = {**started, "TORCHELASTIC_RUN_ID": "none"}
    assert launch_here(unnamed) == launch_here({**unnamed, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert launch_here(unnamed) not in ("", "none"), "torchrun's default names every launch"


def test_of_several_machines_a_start_may_be_one_that_this_machine_did_not_count() -> None:
    started = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "abc", "GROUP_WORLD_SIZE": "2"}
    assert may_be_restart(started)
    assert not may_be_restart({**started, "GROUP_WORLD_SIZE": "1"})
    assert not may_be_restart({})


def test_what_a_rank_behind_the_first_says_begins_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_here() == ""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert rank_here().startswith("rank 3 on ")
