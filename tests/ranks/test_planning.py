"""What is told of a run on several devices before it begins, and settings that have no meaning on one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rank_runs import quick, settings_file

from qlora_hal import train
from qlora_hal.cli.__main__ import main
from qlora_hal.cli.estimate import estimate_as_json, estimate_as_text, estimate_run
from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.values import MemoryEstimate
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.errors import ConfigError, QloraHalError
from qlora_hal.ranks.planning import mode_of
from qlora_hal.report.console import RunConsole
from qlora_hal.run import planned_memory
from qlora_hal.run.start import idle_settings


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(quick(folder / "run", **changes))


def test_estimate_tells_batch_and_memory_of_each_device(tmp_path: Path) -> None:
    asked = config(tmp_path, **{"training.global_batch_size": None, "training.per_device_train_batch_size": 4})
    one, three = estimate_run(asked), estimate_run(asked, 3)
    assert three.memory == one.memory, "each device holds the whole base"
    assert estimate_as_json(three)["plan"] == {
        "devices": 3,
        "per_host": 3,
        "mode": "data",
        "why": "each device holds the whole packed base",
        "sequences_per_step": 12,
    }
    said = " ".join(estimate_as_text(three, asked).split())
    assert "3 devices of one host (data: each device holds the whole packed base): 12 sequences a step" in said
    assert "devices" not in estimate_as_text(one, asked)


def test_the_ranks_of_a_cpu_share_its_memory(tmp_path: Path) -> None:
    asked = config(tmp_path, **{"training.global_batch_size": None})
    assert estimate_run(asked).fits_here
    assert not estimate_run(asked, 4096).fits_here


def test_the_ranks_of_several_hosts_share_the_memory_of_their_own(tmp_path: Path) -> None:
    asked = config(tmp_path, **{"training.global_batch_size": None})
    alone, eight, of_four_hosts = estimate_run(asked), estimate_run(asked, 8), estimate_run(asked, 8, hosts=4)
    assert alone.smallest_memory is not None
    assert eight.smallest_memory == alone.smallest_memory // 8
    assert of_four_hosts.smallest_memory == alone.smallest_memory // 2
    each_alone, each_of_eight, each_of_two = (one.planned.memory_bytes for one in (alone, eight, of_four_hosts))
    assert each_alone is not None
    assert (each_of_eight, each_of_two) == (each_alone // 8, each_alone // 2)
    assert of_four_hosts.plan.as_json().items() >= {"devices": 8, "per_host": 2, "sequences_per_step": 8}.items()
    assert "8 devices of 4 hosts (data:" in estimate_as_text(of_four_hosts, asked)


@pytest.mark.fault("R01")
@pytest.mark.parametrize(("devices", "hosts"), [(8, 3), (1, 2), (4, 0), (4, -1), (None, 2)])
def test_devices_that_hosts_cannot_have_as_many_of_each_are_refused(
    devices: int | None, hosts: int, tmp_path: Path
) -> None:
    with pytest.raises(QloraHalError, match="cannot be dealt out") as caught:
        estimate_run(config(tmp_path), devices, hosts=hosts)
    assert caught.value.code == "QH-R01"


@pytest.mark.fault("R01", "R05", "R06")
@pytest.mark.parametrize(
    ("devices", "changes", "code"),
    [
        (0, {}, "QH-R01"),
        ("many", {}, "QH-R01"),
        (4, {}, "QH-R05"),
        (2, {"parallel.mode": "shard", "backend.name": "mlx_lora"}, "QH-R06"),
        (2, {"backend.name": "mps_bnb"}, "QH-R06"),
    ],
)
def test_estimate_refuses_what_a_run_would_refuse(
    devices: int | str, changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with pytest.raises(QloraHalError) as caught:
        estimate_run(config(tmp_path, **changes), devices)
    assert caught.value.code == code


def test_devices_that_hold_shares_of_the_base_need_less(tmp_path: Path) -> None:
    """All that is not in a decoder layer is whole on each, and two layers are."""
    whole = estimate_run(config(tmp_path), 2)
    shares = [estimate_run(config(tmp_path, **{"parallel.mode": "shard"}), devices) for devices in (2, 6)]
    assert [estimated.plan.mode for estimated in (whole, *shares)] == ["data", "shard", "shard"]
    assert shares[1].memory.weights < shares[0].memory.weights
    assert {(e.memory.adapter, e.memory.activations) for e in shares} == {
        (whole.memory.adapter, whole.memory.activations)
    }


def plan_with(there: int | None, mode: str, needed: int, tmp_path: Path, on_host: tuple[str, ...] = ()) -> str:
    spec = load_spec(find("cpu_torch", listed()))
    memory = MemoryEstimate(needed, 0, 0, 0, 0, 0, 0, 0)
    return mode_of(config(tmp_path, **{"parallel.mode": mode}), 2, spec, memory, there, on_host)[0]


@pytest.mark.parametrize(
    ("there", "mode", "expected"),
    [
        *((100, "auto", "data"), (99, "auto", "shard"), (None, "auto", "data")),
        *((99, "data", "data"), (None, "shard", "shard")),
    ],
)
def test_auto_spreads_the_base_where_the_whole_does_not_fit(
    there: int | None, mode: str, expected: str, tmp_path: Path
) -> None:
    assert plan_with(there, mode, 100, tmp_path) == expected


def test_layers_that_auto_puts_on_the_host_are_not_spread_as_well(tmp_path: Path) -> None:
    """However large the rest: a base that is both is refused when it is loaded."""
    assert plan_with(99, "auto", 100, tmp_path, ("embeddings", "layers")) == "data"
    assert plan_with(99, "auto", 100, tmp_path, ("embeddings",)) == "shard"


def test_estimate_takes_more_devices_than_there_are(tmp_path: Path) -> None:
    assert estimate_run(config(tmp_path), 6).plan.sequences_per_step == 6


def test_a_dry_run_plans_for_the_devices_and_starts_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(settings_file(quick(tmp_path / "run"))), "--dry-run", "--devices", "3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "plan: 16 steps of 6 sequences" in said
    assert "on cpu_torch on 3 devices (data: each device holds the whole packed base); nothing was written" in said
    assert "estimated memory of each device:" in said
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["devices"], plan["mode"], plan["sequences_per_step"], plan["steps"]) == (3, "data", 6, 16)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--smoke", "--print-config", "--show-batch"])
def test_devices_are_refused_where_nothing_would_train_on_them(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(settings_file(quick(tmp_path / "run"))), flag, "--devices", "2"]) == 2
    assert f"error[QH-R06]: {flag} does nothing on several devices." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"parallel.mode": "data"}, ["parallel.mode does nothing on one device"]),
        ({"parallel.timeout_seconds": 30}, ["parallel.timeout_seconds does nothing on one device"]),
    ],
)
def test_settings_of_several_devices_are_told_to_do_nothing_on_one(
    changes: dict[str, Any], notes: list[str], tmp_path: Path
) -> None:
    asked = config(tmp_path, **changes)
    assert list(idle_settings(asked, has_rows=False, ranks=1)) == notes
    assert list(idle_settings(asked, has_rows=False, ranks=2)) == []


def test_before_the_first_step_one_line_tells_devices_batch_and_steps(tmp_path: Path) -> None:
    shown = io.StringIO()
    train(quick(tmp_path / "run", **{"training.max_steps": 1}), console=RunConsole(stream=shown, environ={}))
    [line] = [line for line in shown.getvalue().splitlines() if line.startswith("run: ")]
    assert line.startswith("run: 1 steps of 6 sequences on 1 device, about ")
    assert "tokens a step, learning rate 2e-03 (linear), nf4, float32, into" in line


@pytest.mark.fault("R05")
def test_a_step_that_does_not_divide_is_refused_on_one_device_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 sequences a step cannot be dealt out to 1 device") as caught:
        train(quick(tmp_path / "run", **{"training.per_device_train_batch_size": 2, "training.global_batch_size": 7}))
    assert caught.value.code == "QH-R05"


@pytest.mark.fault("R06")
def test_ranks_do_not_quantize_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun would start them, on a backend whose format needs calibration."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    changes = {"backend.name": "gptq_int4", "quantization.weight_format": "int4_gptq"}
    with pytest.raises(ConfigError, match="several ranks cannot do together") as caught:
        train(quick(tmp_path / "run", **changes))
    assert caught.value.code == "QH-R06"


def test_a_rank_behind_the_first_leaves_what_all_found_to_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["explain", "R02", "--json"]) == 0
    assert main(["train", str(tmp_path / "no.yaml"), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("rank 1 on ")
    assert "error[QH-U" in said.err


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel.mode": "shard"}, id="as asked for"),
        pytest.param({"quantization.weight_format": "none"}, id="where a whole base does not fit"),
    ],
)
def test_a_dry_run_and_estimate_tell_the_same_memory_of_each_device(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks on the processor share its memory, and the layers are spread once."""
    asked = quick(tmp_path / "run", **changes)
    whole = estimate_run(RunConfig.model_validate(asked))
    if "parallel.mode" not in changes:
        monkeypatch.setattr(planned_memory, "device_memory", lambda *_: 2 * whole.memory.total - 2)
    estimated = estimate_run(RunConfig.model_validate(asked), 2)
    assert main(["train", str(settings_file(asked)), "--dry-run", "--devices", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["mode"], plan["why"]) == (estimated.plan.mode, estimated.plan.why)
    assert plan["mode"] == "shard"
    assert plan["memory"]["weights"] == pytest.approx(estimated.memory.weights, rel=0.01)
    assert plan["memory"]["weights"] < whole.memory.weights
