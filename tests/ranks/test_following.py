"""A rank behind the first does the same work and leaves no trace: nothing is told, shown or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_runs import quick

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError
from qlora_hal.hooks import Hooks, hookimpl
from qlora_hal.ranks.following import followed_existing, followed_new, silent_console
from qlora_hal.report.console import RunConsole
from qlora_hal.run.identity import facts_of_rank, software_of_rank
from qlora_hal.run.prepare import prepare_run, resolve_backend

REST_OF_STEP = {"learning_rate": 0.1, "epoch": 0.5, "tokens_per_second": 300.0, "memory_bytes": None}


class Observer:
    def __init__(self) -> None:
        self.seen: list[int] = []

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        self.seen.append(step)


@pytest.mark.parametrize(("tells", "seen"), [(True, [4]), (False, [])])
def test_plugins_are_told_of_a_run_once_by_the_rank_that_writes(tells: bool, seen: list[int]) -> None:
    observer = Observer()
    hooks = Hooks([observer], tells=tells)
    hooks.tell("qlora_hal_step_finished", run=None, step=4, stats=None, **REST_OF_STEP)
    assert observer.seen == seen


def test_its_folder_is_gone_afterwards() -> None:
    with followed_new({"model": {}}) as directory:
        kept = directory.path
        assert (kept / "run.json").is_file()
    assert not kept.exists()


@pytest.mark.fault("S50")
def test_a_run_that_is_not_on_this_machine_is_told_so(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="the run's folder is expected on every machine") as caught,
        followed_existing(tmp_path),
    ):
        pass
    assert caught.value.code == "QH-S50"


def test_its_console_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = silent_console()
    console.note("a note")
    console.data_report(["rows"])
    console.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("world", "is_said"),
    [(World(0, 8), True), (World(0, 8, local_size=2), False), (World(), False)],
    ids=["not counted", "counted", "one process"],
)
def test_ranks_that_nothing_counts_on_this_host_are_said_to_share_its_memory(
    world: World, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(quick(tmp_path / "run", **{"training.global_batch_size": None}))
    console = RunConsole()
    (tmp_path / "run").mkdir()
    prepare_run(config, 1, resolve_backend(config, Hooks(), console), tmp_path / "run", None, console, world=world)
    said = " ".join(capsys.readouterr().err.split())
    assert ("how many of the 8 ranks are on this host (LOCAL_WORLD_SIZE)" in said) is is_said


def test_all_ranks_of_a_release_compare_the_same_facts_and_none_is_a_path(tmp_path: Path) -> None:
    facts = []
    for name, options in (("a", {}), ("b", {"backend.options": {"linear": "fused"}, "data.packing": True})):
        settings = quick(tmp_path / name, **{key: value for key, value in options.items() if key != "backend.options"})
        config = RunConfig.model_validate(settings)
        console = RunConsole(quiet=True)
        resolved = resolve_backend(config, Hooks(), console)
        (tmp_path / name).mkdir()
        prepared = prepare_run(config, 1, resolved, tmp_path / name, None, console, world=World(0, 2))
        facts.append({**software_of_rank(prepared), **facts_of_rank(prepared, None)})
    assert facts[0].keys() == facts[1].keys()
    differing = {name for name in facts[0] if facts[0][name] != facts[1][name]}
    assert differing >= {"data.packing"}
    assert "output_dir" not in facts[0]
    assert not {"model.name_or_path", "data.path"} & facts[0].keys()
    assert json.dumps(facts[0])
