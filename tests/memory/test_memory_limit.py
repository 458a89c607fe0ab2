"""`training.memory_limit`: obeyed by the plan of a run, or refused with what it needs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import train
from qlora_hal.cli.__main__ import main
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError
from qlora_hal.memory.fitting import BATCH
from qlora_hal.report.console import RunConsole
from qlora_hal.run.loop import Progress
from qlora_hal.run.memory_cap import splits_within
from qlora_hal.run.planned_memory import PlannedModel
from tests.memory.configs import write_config

MIB = 2**20


def planned(**changes: Any) -> PlannedModel:
    settings = merged(SMALL, {"data.max_seq_length": 1024, "training.per_device_train_batch_size": 8, **changes})
    return PlannedModel.of(resolve_settings(settings, environ={}).config)


def test_micro_batches_are_halved_until_they_fit() -> None:
    run = planned()
    peaks = {rows: run.estimate({BATCH: rows}).high for rows in (8, 4, 2, 1)}
    assert splits_within(run, peaks[8]) == 0
    assert splits_within(run, peaks[8] - 1) == 1
    assert splits_within(run, peaks[2]) == 2
    assert splits_within(run, peaks[1]) == 3


def test_micro_batches_by_tokens_are_planned_as_so_many_full_rows_and_halved_alike() -> None:
    by_rows, by_tokens = planned(), planned(**{"training.tokens_per_batch": 8 * 1024 + 1000})
    assert by_tokens.config.full_batch_rows == 8
    assert by_tokens.estimate() == by_rows.estimate()
    assert splits_within(by_tokens, by_rows.estimate({BATCH: 2}).high) == 2


@pytest.mark.fault("U81")
def test_a_limit_below_one_row_says_what_it_needs_and_what_would_fit() -> None:
    run = planned()
    needed = run.estimate({BATCH: 1}).high
    with pytest.raises(ConfigError) as refused:
        splits_within(run, needed - 1)
    assert refused.value.code == "QH-U81"
    assert refused.value.context["needed_bytes"] == needed
    assert "--training.recompute full" in refused.value.fix
    told = {path: value for path, value in refused.value.context["settings"].items()}  # type: ignore[attr-defined]
    assert run.estimate(told).high < needed, "what is advised fits"


def test_a_limit_that_no_setting_reaches_says_the_least() -> None:
    with pytest.raises(ConfigError, match=r"training\.memory_limit is 64 MiB") as refused:
        splits_within(planned(), 64 * MIB)
    assert "Give it more" in refused.value.fix


@pytest.mark.parametrize("size", ["lots", "0", "-3GB", "12 potatoes"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="a size such as 24GB is expected"):
        planned(**{"training.memory_limit": size})


def test_sizes_are_read_as_cards_are_sold() -> None:
    sizes = {"24GB": 24 * 2**30, "1500 MiB": 1500 * MIB, "8": 8 * 2**30, "0.5tb": 2**39}
    for text, size in sizes.items():
        assert planned(**{"training.memory_limit": text}).config.training.memory_limit_bytes == size


@pytest.mark.slow
def test_a_run_with_a_limit_takes_smaller_micro_batches_and_the_same_step(tmp_path: Path) -> None:
    changes = {"training.max_steps": 2, "training.gradient_accumulation_steps": 1, "data.max_seq_length": 128}
    run = planned(**changes)
    limit = (run.estimate({BATCH: 4}).high + run.estimate({BATCH: 8}).high) // 2 // MIB
    said = io.StringIO()
    free, capped = (
        train(
            merged(SMALL, {**changes, BATCH: 8, "output_dir": str(tmp_path / name), **more}),
            console=RunConsole(stream=said),
        )
        for name, more in (("free", {}), ("capped", {"training.memory_limit": f"{limit}MB"}))
    )
    assert "micro-batches have at most 4 rows" in said.getvalue()
    assert [step for step, _ in capped.losses] == [step for step, _ in free.losses]
    for (_, one), (_, other) in zip(capped.losses, free.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5), "float32 sums in another order"


AUTO = {"training.recompute": "auto"}


def test_what_is_left_to_the_memory_is_chosen_for_the_micro_batches_that_are_cut(tmp_path: Path) -> None:
    """Eight rows fit with nothing, two recomputed; one row fits with all activations kept, and takes less time."""
    shape = {"data.max_seq_length": 1024, "training.per_device_train_batch_size": 8}
    run = planned(**shape)
    limit = run.estimate({BATCH: 1, "training.recompute": "none"}).high
    assert run.estimate({BATCH: 8, "training.recompute": "full"}).high > limit
    said = io.StringIO()
    cap = {"training.memory_limit": f"{limit / MIB + 1:.3f}MB", "output_dir": str(tmp_path)}
    rehearsed = train(merged(SMALL, {**shape, **AUTO, **cap}), console=RunConsole(stream=said), dry_run=True)
    assert "micro-batches have at most 1 row" in said.getvalue()
    assert "recompute none: an estimated peak of" in said.getvalue()
    assert "but above" not in said.getvalue()
    assert rehearsed is not None


def test_what_is_left_to_a_card_keeps_to_the_limit(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On every card of the list, not on the one alone that is named."""
    asked = ("--model", llama_8b, "--training.recompute", "auto", "--training.memory_limit", "20GB", *ONE_ROW)
    assert main(["estimate", *asked, "--cards", "--json"]) == 0
    table = {row["name"]: row for row in json.loads(capsys.readouterr().out)["table"]}
    assert main(["estimate", *asked, "--gpu", "H200", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["high"] <= 20 * 2**30
    assert table["NVIDIA H200"]["methods"]["4-bit"]["high"] == alone["high"]


ONE_ROW = ("--training.per_device_train_batch_size", "1", "--data.max_seq_length", "4096")


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    write_config(tmp_path / "8b", hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256)
    return str(tmp_path / "8b")


def test_a_new_run_begins_with_the_splits_of_its_plan() -> None:
    """They are kept in checkpoints as those are that memory forced."""
    assert Progress.from_json(Progress(micro_batch_splits=2).as_json()).micro_batch_splits == 2


def test_devices_that_share_the_base_keep_to_the_limit_with_their_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ("--training.per_device_train_batch_size", "1", "--quantization.weight_format", "none")
    run = ("--demo", "--backend", "cpu_torch", "--devices", "2", *row, "--output_dir", str(tmp_path / "run"))
    highs = []
    for mode in ("data", "shard"):
        assert main(["estimate", *run, "--parallel.mode", mode, "--json"]) == 0
        highs.append(json.loads(capsys.readouterr().out)["high"])
    limit = f"{sum(highs) / 2 / MIB:.3f}MB"
    assert highs[1] < highs[0]
    for mode, status in (("data", 2), ("shard", 0)):
        asked = [*run, "--parallel.mode", mode, "--training.memory_limit", limit, "--dry-run"]
        assert main(["train", *asked]) == status, capsys.readouterr().err
