"""Whole runs of several ranks on the CPU, started as a user starts them: they compute what one computes, one that fails
is named, and what was saved goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed_plugins import describe
from rank_runs import (
    adapter,
    losses,
    qlora_hal,
    quick,
    rank_below,
    rank_process,
    record,
    running,
    settings_file,
    steps_of,
    torchrun,
    wait_for,
    windows,
)
from safetensors.numpy import load_file

from qlora_hal import resume, train
from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.demo import data_path
from qlora_hal.errors import BackendError, ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("usual_signals")]

LOSS_BOUND = 2e-5
"""Relative. Ranks differ from one in the order of float32 sums alone: a gradient of 2^-24 relative error for each of
some hundred additions is off by about 1e-5, and Adam's quotient hands that on as it is; 3e-7 was seen."""
STEPS = 16


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, by `--devices`."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(quick(folder), devices=2)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, asked to stop by SIGTERM."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with running(qlora_hal("train", str(settings_file(quick(folder))), "--devices", "2")) as command:
        command.until("step 3/")
        command.process.send_signal(signal.SIGTERM)
        assert command.ended() == 75, command.said
    assert "Stopped by SIGTERM after step" in command.said
    assert "qlora-hal resume" in command.said
    return folder


def test_two_devices_give_what_one_gives(undisturbed: Path, tmp_path: Path) -> None:
    train(quick(tmp_path / "run"))
    assert windows(tmp_path / "run") == windows(undisturbed)
    assert losses(undisturbed) == pytest.approx(losses(tmp_path / "run"), rel=LOSS_BOUND)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (undisturbed, tmp_path / "run"))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-3 * float(np.abs(tensor).max()))


def test_two_devices_have_the_rows_of_several_sources_and_those_in_memory(tmp_path: Path) -> None:
    lines = data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = []
    for name, part, weight in (("a", lines[:20], 0.6), ("b", lines[20:30], 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        sources.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    changes = {"data.path": "", "data.sources": sources, "training.max_steps": 6, "training.eval_steps": 3}
    held = [json.loads(line) for line in lines[30:38]]
    for name, devices in (("one", None), ("two", 2)):
        train(quick(tmp_path / name, **changes), validation_data=held, devices=devices)
    assert windows(tmp_path / "one") == windows(tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=LOSS_BOUND)
    one, two = (record(tmp_path / name)["eval_loss_after"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=LOSS_BOUND)


def test_the_record_says_who_computed_it_and_what_talking_cost(undisturbed: Path) -> None:
    ranks = record(undisturbed)["ranks"]
    assert ranks["world_size"] == 2
    assert ranks["hosts"] == [socket.gethostname()[:64]] * 2
    assert (ranks["collectives"], ranks["links"]) == ("gloo", "this machine")
    assert 0 < ranks["communication_share"] < 1
    assert ranks["communication_seconds"] < ranks["loop_seconds"]
    assert record(undisturbed)["resolved"]["sequences_per_step"] == 6


def test_torchrun_gives_the_same_bits_and_the_second_rank_is_silent(undisturbed: Path, tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(tmp_path / "logs"))
    words = torchrun("train", str(settings_file(quick(tmp_path / "run"))), "--json", options=options)
    with running(words) as command:
        assert command.ended() == 0, command.said
    said = {file.parent.name: file for file in (tmp_path / "logs").rglob("std*.log") if file.stat().st_size}
    assert set(said) == {"0"}
    [output] = (tmp_path / "logs").rglob("0/stdout.log")
    assert json.loads(output.read_text())["steps"] == STEPS
    assert adapter(tmp_path / "run") == adapter(undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_devices_go_on_by_themselves_after_a_kill(rank: int, undisturbed: Path, tmp_path: Path) -> None:
    words = qlora_hal("train", str(settings_file(quick(tmp_path / "run"))), "--devices", "2", "--max-restarts", "1")
    with running(words) as command:
        command.until("step 4/")
        rank_process(command, rank).kill()
        assert command.ended() == 0, command.said
    assert "resumed from step" in command.said
    assert adapter(tmp_path / "run") == adapter(undisturbed)


def test_one_device_goes_on_by_itself_too(undisturbed: Path, tmp_path: Path) -> None:
    words = qlora_hal("train", str(settings_file(quick(tmp_path / "run"))), "--devices", "1", "--max-restarts", "1")
    with running(words) as command:
        command.until("step 4/")
        rank_process(command, 0).kill()
        assert command.ended() == 0, command.said
    assert "resumed from step" in command.said
    assert windows(tmp_path / "run") == windows(undisturbed)


def test_torchrun_goes_on_after_a_kill(undisturbed: Path, tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    with running(torchrun("train", str(settings_file(quick(tmp_path / "run"))), options=options)) as command:
        command.until("step 4/")
        rank_process(command, 1).kill()
        assert command.ended() == 0, command.said
    assert "resumed from step" in command.said
    assert adapter(tmp_path / "run") == adapter(undisturbed)


def test_a_rank_that_dies_before_anything_was_saved_starts_the_run_again(undisturbed: Path, tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", **{"checkpoint.save_steps": 100})
    words = qlora_hal("train", str(settings_file(settings)), "--devices", "2", "--max-restarts", "1")
    with running(words) as command:
        command.until("step 3/")
        rank_process(command, 0).kill()
        assert command.ended() == 0, command.said
    assert windows(tmp_path / "run") == windows(undisturbed)
    assert adapter(tmp_path / "run") == adapter(undisturbed)


def test_a_restart_never_goes_on_with_the_run_of_another_launch(undisturbed: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    settings = quick(earlier, **{"training.learning_rate": 1e-3})
    words = qlora_hal("train", str(settings_file(settings)), "--devices", "2", "--max-restarts", "1")
    with running(words) as command:
        assert command.ended() == 2, command.said
    assert "QH-S13" in command.said
    assert adapter(earlier) == adapter(undisturbed)


@pytest.mark.fault("R02")
def test_a_killed_rank_is_named_with_its_host_and_the_checkpoint_that_stands(tmp_path: Path) -> None:
    with running(qlora_hal("train", str(settings_file(quick(tmp_path / "run"))), "--devices", "2")) as command:
        command.until("step 3/")
        rank_process(command, 1).kill()
        assert command.ended() == 3, command.said
    assert f"error[QH-R02]: Rank 1 on {socket.gethostname()} was ended by SIGKILL after step" in command.said
    assert re.search(r"The checkpoint of step \d+ stands\.", command.said)
    assert command.said.count("error[") == 1
    assert "Traceback" not in command.said


@pytest.mark.fault("R02")
def test_a_rank_that_no_longer_answers_ends_the_run_and_is_named(tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", **{"parallel.timeout_seconds": 8, "training.max_steps": 400})
    with running(qlora_hal("train", str(settings_file(settings)), "--devices", "2")) as command:
        command.until("step 3/")
        began = time.monotonic()
        rank_process(command, 1).send_signal(signal.SIGSTOP)
        assert command.ended() == 3, command.said
        took = time.monotonic() - began
    assert "error[QH-R02]: Rank 1 of 2 is gone or does not answer. It was waited for 8 s" in command.said
    assert f"rank 1 on {socket.gethostname()}" in command.said
    assert re.search(r"The checkpoint of step \d+ stands\.", command.said)
    assert took < 8 + 30 + 30, "the limit, what torchrun waits for one that it ends, and the rest"
    assert checkpoints(tmp_path / "run")


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_a_run_goes_on_with_another_number_of_devices(
    devices: int, stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    resume(run, devices=devices)
    assert windows(run) == windows(undisturbed)
    if devices == 2:
        assert adapter(run) == adapter(undisturbed)
        assert losses(run) == losses(undisturbed)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=LOSS_BOUND)
    assert record(run)["ranks"]["world_size"] == devices


@pytest.mark.fault("R05")
def test_a_number_of_devices_that_would_change_the_step_is_refused(stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    with pytest.raises(ConfigError, match="6 sequences a step cannot be dealt out to 4 devices") as caught:
        resume(run, devices=4)
    assert caught.value.code == "QH-R05"


def test_the_terminal_stops_all_ranks_with_the_state_saved(tmp_path: Path) -> None:
    with running(qlora_hal("train", str(settings_file(quick(tmp_path / "run"))), "--devices", "2")) as command:
        command.until("step 3/")
        command.process.send_signal(signal.SIGINT)
        assert command.ended() == 75, command.said
    assert "death signal" not in command.said, "torchrun's own words"
    saved = max(step for step, _ in checkpoints(tmp_path / "run"))
    assert f"Stopped by SIGINT after step {saved}" in command.said or f"step {saved} is saved" in command.said
    assert record(tmp_path / "run")["status"] == "stopped"


def test_ranks_do_not_outlive_the_command_that_started_them_and_save(tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", **{"checkpoint.save_steps": 1000, "training.max_steps": 2000})
    with running(qlora_hal("train", str(settings_file(settings)), "--devices", "2")) as command:
        command.until("step 2/")
        ranks = [rank_process(command, rank) for rank in (0, 1)]
        command.process.kill()
        wait_for(lambda: not any(rank.is_running() for rank in ranks))
    assert checkpoints(tmp_path / "run")
    assert record(tmp_path / "run")["status"] == "stopped"


def test_a_scheduler_that_warns_gets_a_save_from_all_ranks_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", **{"checkpoint.save_steps": 1000, "training.max_steps": 40})
    with running(qlora_hal("train", str(settings_file(settings)), "--devices", "2")) as command:
        command.until("step 2/")
        command.process.send_signal(signal.SIGUSR1)
        assert command.ended() == 0, command.said
    assert "SIGUSR1: saving after this step" in command.said
    assert len(checkpoints(tmp_path / "run")) == 2


@pytest.mark.fault("R03")
def test_ranks_with_other_settings_or_rows_are_told_before_the_model_loads(tmp_path: Path) -> None:
    first, second = quick(tmp_path / "a"), quick(tmp_path / "b", **{"training.learning_rate": 1e-5})
    rows = Path(first["data"]["path"])
    fewer = rows.with_name("fewer.jsonl")
    fewer.write_text("".join(rows.read_text().splitlines(keepends=True)[:30]))
    second["data"]["path"] = str(fewer)
    port = free_port()
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "odd")
    commands = [
        torchrun("train", str(settings_file(settings)), options=(*meeting, "--rdzv-endpoint", f"localhost:{port}"))
        for settings in (first, second)
    ]
    with running(commands[0]) as one, running(commands[1]) as other:
        assert one.ended() != 0
        assert other.ended() != 0
    said = one.said + other.said
    assert said.count("error[QH-R03]") == 1, said
    assert "training.learning_rate (rank 1); the rows (rank 1)" in said
    assert "run: " not in said


@pytest.mark.fault("R04")
def test_a_port_that_another_program_has_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = alone_as_rank_0(tmp_path, taken.getsockname()[1])
    assert "error[QH-R04]: Rank 0 of 2 did not meet the others at 127.0.0.1:" in said
    assert "EADDRINUSE" in said


@pytest.mark.fault("R04")
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    said = alone_as_rank_0(tmp_path, free_port())
    assert "error[QH-R04]: Rank 0 of 2 did not meet the others at 127.0.0.1:" in said
    assert "within 3 s" in said
    assert "1/2 clients joined" in said


def alone_as_rank_0(folder: Path, port: int) -> str:
    """What the first of two ranks says that is started alone."""
    file = settings_file(quick(folder / "run", **{"parallel.timeout_seconds": 3}))
    meeting = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with running(qlora_hal("train", str(file)), **meeting) as command:
        assert command.ended() == 3, command.said
    return command.said


def test_two_launchers_go_on_together_after_a_kill(undisturbed: Path, tmp_path: Path) -> None:
    """As on two machines: each counts the failures of its own ranks alone."""
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two")
    options = (*meeting, "--rdzv-endpoint", f"localhost:{free_port()}", "--max-restarts", "1")
    words = torchrun("train", str(settings_file(quick(tmp_path / "run"))), options=options)
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with running(words, **fresh) as one, running(words, **fresh) as other:
        wait_for(lambda: "step 4/" in one.said + other.said)
        second = wait_for(lambda: rank_below(one, 1) or rank_below(other, 1))
        second.kill()
        assert (one.ended(), other.ended()) == (0, 0), one.said + other.said
    assert "resumed from step" in one.said + other.said
    assert adapter(tmp_path / "run") == adapter(undisturbed)


STARVED = """
from dataclasses import replace
from pathlib import Path
from qlora_hal_backends.cpu_torch import SPEC as CPU, probe as cpu_probe
def probe():
    return replace(cpu_probe(), backend="starved")
SPEC = replace(CPU, name="starved", probe=probe, trainer="starved_plugin:open_trainer")
def open_trainer():
    from qlora_hal.errors import OutOfMemoryError
    from qlora_hal_backends.torch_family.platform import CPU as PLATFORM
    from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer
    class Starved(TorchLoRATrainer):
        def _accumulated(self, flat, window, lacking, denominator, dropout_key):
            if self._ranks.world.rank == 1 and any(batch.input_ids.shape[0] > 1 for batch in window):
                flat.gradients.fill_(1.0)
                raise OutOfMemoryError("QH-N07", "no room for two rows", fix="Less.")
            return super()._accumulated(flat, window, lacking, denominator, dropout_key)
    return Starved(SPEC, PLATFORM)
"""


def test_memory_that_runs_out_on_one_rank_splits_the_window_on_all(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "starved_plugin.py").write_text(STARVED)
    describe(plugins, "starved-plugin", {"qlora_hal.backends": {"starved": "starved_plugin:SPEC"}})
    batches: dict[str, Any] = {"training.per_device_train_batch_size": 3, "training.global_batch_size": 6}
    whole = quick(tmp_path / "whole", **batches)
    short = quick(tmp_path / "short", **batches, **{"backend.name": "starved"})
    words = qlora_hal("train", str(settings_file(short)), "--devices", "2")
    with running(words, PYTHONPATH=str(plugins)) as command:
        assert command.ended() == 0, command.said
    train(whole)
    assert "out of memory; micro-batches now have at most 1 rows" in command.said
    assert windows(tmp_path / "short") == windows(tmp_path / "whole")
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS_BOUND)


def test_evaluation_early_stopping_and_an_uneven_end_are_those_of_one_device(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data.validation_fraction": 0.2,
        "training.eval_steps": 2,
        "training.max_steps": None,
        "training.num_train_epochs": 2,
    }
    train(quick(tmp_path / "one", **changes))
    train(quick(tmp_path / "two", **changes), devices=2)
    one, two = (json_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert windows(tmp_path / "one") == windows(tmp_path / "two")
    assert len({line["token_count"] for line in steps_of(tmp_path / "one")}) > 1
    evaluations = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in (one, two)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=LOSS_BOUND)
    assert record(tmp_path / "one")["best_step"] == record(tmp_path / "two")["best_step"]


def test_an_error_of_the_first_rank_is_told_as_in_a_run_of_one(tmp_path: Path) -> None:
    settings = quick(tmp_path / "run")
    settings["data"]["path"] = str(tmp_path / "nothing.jsonl")
    with pytest.raises(Exception, match=r"nothing\.jsonl") as alone:
        train(quick(tmp_path / "alone") | {"data": settings["data"]})
    with pytest.raises(type(alone.value), match=r"nothing\.jsonl") as caught:
        train(settings, devices=2)
    assert getattr(caught.value, "code", "") == getattr(alone.value, "code", "")
    assert not isinstance(caught.value, BackendError)


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port
