"""Ranks of `mlx_lora`, run for real: processes of this machine over MLX's ring."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed_plugins import install
from one_mlx_rank import STEPS, figures, idle_shares, opened, step_shares, stepped, uneven_shares, whole
from small_runs import SMALL, merged
from stopped_runs import SHORT, rows_in

from qlora_hal import train
from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError
from qlora_hal.ranks.identity import MLX_HOSTS, MLX_RANK, MLX_SIZE, seed_of_ranks, world_here

LAUNCHER = "qlora_hal_backends.mlx_lora.launching"
TESTS = Path(__file__).parents[1]
UNIT_ROUNDOFF = 2.0**-24


def start(folder: Path, ranks: int, restarts: int = 0, **task: Any) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", LAUNCHER, str(ranks), str(restarts), "one_mlx_rank", str(folder)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def carried_out(folder: Path, ranks: int, restarts: int = 0, **task: Any) -> int:
    launcher = start(folder, ranks, restarts, **task)
    _, said = launcher.communicate(timeout=300)
    print(said)
    return launcher.returncode


def failures(folder: Path) -> list[list[Any]]:
    return json.loads((folder / "failures.json").read_text())


def told(folder: Path, rank: int) -> Any:
    return json.loads((folder / f"rank-{rank}.json").read_text())


# who is who ----------------------------------------------------------------------------------------------------------
def environment(rank: int, hosts: Path, content: str) -> dict[str, str]:
    hosts.write_text(content)
    return {MLX_RANK: str(rank), MLX_HOSTS: str(hosts)}


def test_a_rank_is_counted_among_those_of_its_own_address(tmp_path: Path) -> None:
    hosts = '[["10.0.0.1:5000","10.0.0.1:5001"],["10.0.0.2:5002"],["10.0.0.1:5003"]]'
    worlds = [world_here(environment(rank, tmp_path / "hosts", hosts)) for rank in range(3)]
    assert worlds == [World(0, 3, 0, 2), World(1, 3, 0, 1), World(2, 3, 1, 2)]


def test_one_host_has_no_ring_and_is_one_rank(tmp_path: Path) -> None:
    """mlx.launch writes an empty file then."""
    assert world_here(environment(0, tmp_path / "hosts", "\n")) == World()


def test_ranks_of_nccl_are_counted_by_a_variable() -> None:
    assert world_here({MLX_RANK: "2", MLX_SIZE: "4"}) == World(2, 4, 0)


@pytest.mark.parametrize("content", ["no json", "{}", "[[]]", '["10.0.0.1:5000"]'])
def test_a_file_that_lists_no_ranks_is_refused_by_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(BackendError, match="MLX_HOSTFILE") as refused:
        world_here(environment(0, tmp_path / "hosts", content))
    assert refused.value.code == "QH-R04"


def test_a_rank_that_the_file_does_not_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as refused:
        world_here(environment(2, tmp_path / "hosts", '[["10.0.0.1:1"],["10.0.0.2:2"]]'))
    assert refused.value.code == "QH-R04"


def test_ranks_draw_one_seed_from_files_of_different_names(tmp_path: Path) -> None:
    hosts = '[["10.0.0.1:1"],["10.0.0.2:2"]]'
    first, second = (seed_of_ranks(None, environment(rank, tmp_path / f"hosts{rank}", hosts)) for rank in range(2))
    assert first == second
    assert first != seed_of_ranks(None, environment(0, tmp_path / "others", hosts.replace(":2", ":3")))


@pytest.mark.long
def test_what_mlx_launch_starts_knows_its_rank() -> None:
    program = "from qlora_hal.ranks.identity import *; print(world_here(), seed_of_ranks(None))"
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--hosts", HERE, "--backend", "ring"]
    done = subprocess.run(
        [*launch, "--", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.PIPE,
    )
    lines = sorted(done.stdout.splitlines())
    assert [line.rpartition(" ")[0] for line in lines] == [str(World(0, 2, 0, 2)), str(World(1, 2, 1, 2))]
    assert len({line.rpartition(" ")[2] for line in lines}) == 1


HERE = "127.0.0.1"


# sums ----------------------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_sums_over_ranks_are_those_of_float64_and_the_same_bits_everywhere(tmp_path: Path, size: int) -> None:
    """Parts of hashes have 48 bits, which float32 does not hold; the others show any rounding."""
    values = [
        [float(2**48 - 1 - rank), 1.0, 0.1 * (rank + 1), 1e300 / (rank + 1), 1e-300, 3.7 - rank] for rank in range(size)
    ]
    assert carried_out(tmp_path, size, name="sums", values=values) == 0
    expected = np.array(values)[0]
    for row in np.array(values)[1:]:
        expected = expected + row
    for rank in range(size):
        assert np.load(tmp_path / f"rank-{rank}.npz")["found"].tobytes() == expected.tobytes()


# steps ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def of_two(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("two")
    assert carried_out(folder, 2, name="steps", model=str(llama)) == 0
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(2)]


@pytest.fixture(scope="module")
def of_one(llama: Path) -> Any:
    trainer = opened(llama, World())
    yield trainer
    trainer.close()


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")}


def same_bits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


@pytest.mark.long
@pytest.mark.parametrize("shares", [uneven_shares, idle_shares])
def test_gradients_are_those_of_the_whole_window_on_every_rank(
    of_one: Any, of_two: list[dict[str, Any]], shares: Any
) -> None:
    """n gradients g_i, each scaled by its share of the tokens, are added in two orders: each sum is within (n - 1) u of
    the exact one, relative to the sum of the magnitudes, and each scaled g_i within 2 u, by two roundings."""
    window = whole(shares())
    counts = [batch.counted_tokens for batch in window]
    expected = of_one.gradients(window)
    parts = [of_one.gradients([batch]) for batch in window]
    bound = (2 * (len(window) - 1) + 2 * 2) * UNIT_ROUNDOFF
    name = "uneven" if shares is uneven_shares else "idle"
    for found in (part(each, name) for each in of_two):
        assert found.keys() == expected.keys()
        for tensor, values in found.items():
            shares_of = [abs(g[tensor]) * (n / sum(counts)) for g, n in zip(parts, counts, strict=True)]
            assert (abs(values - expected[tensor]) <= bound * sum(shares_of)).all(), tensor
    assert same_bits(part(of_two[0], name), part(of_two[1], name))


@pytest.mark.long
def test_two_ranks_with_a_micro_batch_each_take_the_steps_of_one_bit_for_bit(
    llama: Path, of_two: list[dict[str, Any]]
) -> None:
    """0 + a + b on one rank is a + b over two: the same float32 sum, with the same dropout masks in a and b."""
    trainer = opened(llama, World())
    try:
        taken = [figures(stepped(trainer, whole(step_shares(n)), whole(step_shares(n)), n)) for n in range(STEPS)]
        adapter = trainer.export_adapter().tensors
    finally:
        trainer.close()
    for found in of_two:
        assert [list(found[f"figures/{step}"]) for step in range(STEPS)] == taken
        assert same_bits(part(found, "adapter"), dict(adapter))


@pytest.mark.long
def test_memory_that_runs_out_on_one_rank_is_raised_on_all_and_changes_nothing(of_two: list[dict[str, Any]]) -> None:
    """That nothing was changed is shown by the steps after it, which are those of a trainer that had enough."""
    first, second = (str(found["out_of_memory"]) for found in of_two)
    assert first == "QH-N07 Rank 1 of 2 ran out of memory in a training step."
    assert second.startswith("QH-N07")
    assert "MLX" in second


@pytest.mark.long
def test_a_gradient_that_is_not_finite_on_one_rank_refuses_the_step_on_all(of_two: list[dict[str, Any]]) -> None:
    for found in of_two:
        _, _, norm, applied = found["spoilt"]
        assert np.isnan(norm)
        assert not applied
        assert same_bits(part(found, "adapter"), part(found, "after"))


@pytest.mark.long
def test_the_same_ranks_give_the_same_bits_again(llama: Path, of_two: list[dict[str, Any]], tmp_path: Path) -> None:
    assert carried_out(tmp_path, 2, name="steps", model=str(llama)) == 0
    again = dict(np.load(tmp_path / "rank-1.npz"))
    numbers = {name: value for name, value in again.items() if name != "out_of_memory"}
    assert same_bits(numbers, {name: of_two[1][name] for name in numbers})


# ranks that are not there --------------------------------------------------------------------------------------------
@pytest.mark.long
def test_a_rank_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    assert carried_out(tmp_path, 2, name="leaves", how="killed", timeout_seconds=120) == 1
    code, message, _ = told(tmp_path, 0)
    assert (code, message) == ("QH-R02", "Rank 1 of 2 is gone or does not answer.")
    assert failures(tmp_path)[0] == [1, "SIGKILL"]


@pytest.mark.long
def test_a_rank_that_hangs_is_given_up_after_the_time_there_is(tmp_path: Path) -> None:
    assert carried_out(tmp_path, 2, name="leaves", how="hangs", timeout_seconds=2) == 1
    assert told(tmp_path, 0) == ["QH-R02", "Rank 1 of 2 is gone or does not answer.", "Nothing came within 2 s."]
    assert failures(tmp_path) == [[0, "exit status 3"]]


@pytest.mark.long
def test_a_rank_that_never_comes_is_given_up_after_the_time_there_is(tmp_path: Path) -> None:
    assert carried_out(tmp_path, 2, name="alone", timeout_seconds=2) == 0
    code, message, seconds = told(tmp_path, 0)
    assert (code, message) == ("QH-R04", "Rank 0 of 2 did not meet the others within 2 s.")
    assert 2 <= seconds < 20


# the launcher --------------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_a_rank_that_fails_ends_the_others_and_is_told_of(tmp_path: Path) -> None:
    assert carried_out(tmp_path, 3, name="fails", times=1) == 1
    assert failures(tmp_path) == [[1, "exit status 7"]]


@pytest.mark.long
def test_ranks_are_started_anew_as_often_as_was_asked(tmp_path: Path) -> None:
    assert carried_out(tmp_path / "enough", 2, 2, name="fails", times=2) == 0
    assert not (tmp_path / "enough" / "failures.json").exists()
    assert carried_out(tmp_path / "too few", 2, 1, name="fails", times=2) == 1


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start(tmp_path, 2, name="waits")
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    launcher.send_signal(number)
    launcher.communicate(timeout=600)
    assert launcher.returncode == 0
    assert [told(tmp_path, rank) for rank in range(2)] == [number.name] * 2
    assert not (tmp_path / "failures.json").exists()


def wait_until(holds: Any, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# whole runs ----------------------------------------------------------------------------------------------------------
DIES = """
import os, signal, subprocess, sys
from qlora_hal.hooks import hookimpl
@hookimpl
def qlora_hal_step_finished(step):
    if step == 3 and os.environ.get("MLX_RANK") == "0":
        ranks = subprocess.run(["pgrep", "-P", str(os.getppid())], capture_output=True, check=True).stdout.split()
        for rank in {int(rank) for rank in ranks} - {os.getpid()}:
            os.kill(rank, signal.SIGKILL)
PLUGIN = sys.modules[__name__]
"""
"""On rank 0, whose brother it ends: both are children of the launcher."""


def losses_in(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "learning_rate" in line}


@pytest.mark.long
def test_a_run_whose_rank_is_killed_says_so_and_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Two ranks with a micro-batch each add what one adds, in the same order: the losses are those of one, bit for bit,
    before the end and after it."""
    rows = {"data.path": rows_in(tmp_path)["data.path"], "training.eval_steps": None, "lora.dropout": 0.1}
    sizes = {"training.per_device_train_batch_size": 2, "training.global_batch_size": 4, "training.max_steps": 5}
    tree = merged(SMALL, {**SHORT, **rows, **sizes, "backend.name": "mlx_lora"})
    train({**tree, "output_dir": str(tmp_path / "one")})
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    install(plugins, {"dies": ("dies", DIES)}, group="qlora_hal.hooks", attribute="PLUGIN")
    (tmp_path / "run.json").write_text(json.dumps(tree))
    folder = str(tmp_path / "two")
    killed = command("train", str(tmp_path / "run.json"), "--output_dir", folder, "--devices", "2", plugins=plugins)
    assert "QH-R02" in killed.stderr
    assert "Rank 1 on" in killed.stderr
    assert "was ended by SIGKILL" in killed.stderr
    assert killed.returncode == 3
    assert max(losses_in(tmp_path / "two")) < 5
    resumed = command("resume", folder, "--devices", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert losses_in(tmp_path / "two") == losses_in(tmp_path / "one")


def command(*words: str, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PYTHONPATH": str(plugins)} if plugins is not None else {})}
    arguments = [sys.executable, "-m", "qlora_hal", *words]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=400, env=environment)
