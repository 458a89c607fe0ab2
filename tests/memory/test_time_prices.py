"""Prices are what records hold, and order choices as they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.memory.time_prices import (
    DISK_RATE,
    HEAD_AGAIN,
    HEAD_TOKENS,
    LAYERS_TOKENS,
    PASS_TOKENS,
    RECOMPUTED,
    STREAMED,
    PassChoice,
)

RUNS = Path(__file__).parents[2] / "docs" / "runs"


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((RUNS / "h200_memory_steps.json").read_text())["alone_on_the_gpu"]["found"]
    return {(step["row"], step["choice"]): step for step in found}


@pytest.fixture(scope="module")
def passes() -> tuple[float, float]:
    """Milliseconds of a pass with no tokens, and of a token."""
    results = json.loads((RUNS / "h200_step_8b.json").read_text())["results"]
    times = {one["micro_batch"] * 2048: one["step_ms"] for one in results if one["system"] == "ours"}
    token = (times[8192] - times[2048]) / (8192 - 2048)
    return times[2048] - 2048 * token, token


def test_recomputation_costs_what_it_was_measured_to_cost(alone: dict[tuple[str, str], dict[str, Any]]) -> None:
    fastest = alone["8b-recomputed", "none, adamw"]["tokens_per_second"]
    for choice, price in RECOMPUTED.items():
        measured = fastest / alone["8b-recomputed", f"{choice}, adamw"]["tokens_per_second"]
        assert price == pytest.approx(measured, abs=0.01)


def test_a_pass_costs_what_it_was_measured_to_cost(passes: tuple[float, float]) -> None:
    nothing, token = passes
    assert pytest.approx(nothing / token, abs=1) == PASS_TOKENS
    assert 1 / PassChoice(2048).time * PassChoice(8192).time == pytest.approx(15532.1 / 17022.9, abs=0.001)


def test_layers_cost_what_they_were_measured_to_cost(
    alone: dict[tuple[str, str], dict[str, Any]], passes: tuple[float, float]
) -> None:
    stayed = alone["8b-streamed-8192", "none, adamw"]["tokens_per_second"]
    crossed = alone["8b-streamed-8192", "none, host: embeddings+layers, adamw"]
    assert pytest.approx(stayed / crossed["tokens_per_second"], abs=0.005) == STREAMED
    [note] = crossed["notes"]
    assert "3.35 GiB cross to the device in each direction of a pass, 67 ms" in note
    assert pytest.approx(2 * 67 / passes[1], abs=5) == LAYERS_TOKENS
    head = 128256 * 4096
    assert pytest.approx(LAYERS_TOKENS * head * 2 / (3.35 * 2**30), abs=5) == HEAD_TOKENS
    assert pytest.approx(head / 8.03e9 / 2, abs=0.005) == HEAD_AGAIN


def test_layers_of_a_mixture_cost_what_they_were_measured_to_cost() -> None:
    """Of Qwen3-30B-A3B's shape, whose tokens meet an eleventh of its weights."""
    [kept] = [one for one in _results("h200_moe.json") if one["system"] == "ours, none"]
    streamed = [one for one in _results("h200_moe_streamed.json") if one["notes"]]
    price = PassChoice(512, "none", ("layers",), to_each=11.0).time
    for one, milliseconds in zip(streamed, (300, 281), strict=True):
        assert f"14.4 GiB cross to the device in each direction of a pass, {milliseconds} ms" in one["notes"][0]
        assert 2e-3 * milliseconds * kept["tokens_per_second"] / 512 == pytest.approx(price, rel=0.05)
    assert streamed[1]["length"] == 512
    assert kept["tokens_per_second"] / streamed[1]["tokens_per_second"] == pytest.approx(price, rel=0.1)
    assert PassChoice(512, "none", ("layers",), to_each=1.2).time == PassChoice(512, "none", ("layers",)).time


def _results(record: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RUNS / record).read_text())["results"]
    return found


def test_layers_on_a_disk_take_as_long_as_it_takes_to_read_them(passes: tuple[float, float]) -> None:
    """A stated rate of the disk, which all ranks of its host share."""
    streamed = ("embeddings", "layers")
    in_memory, alone, both = (PassChoice(512, "none", streamed, readers=readers) for readers in (0, 1, 2))
    seconds = alone.time * 512 * passes[1] / 1e3
    assert seconds == pytest.approx(2 * 3.35 * 2**30 / DISK_RATE, rel=0.01)
    assert both.time == pytest.approx(2 * alone.time)
    assert alone.time > 10 * in_memory.time
    assert PassChoice(512, "none", ("embeddings",), readers=1).time == PassChoice(512, "none", ("embeddings",)).time


def test_copies_hide_behind_enough_tokens_and_no_fewer() -> None:
    layers = ("embeddings", "layers")
    assert PassChoice(8192, "none", layers).time == PassChoice(8192).time * STREAMED
    assert PassChoice(512, "none", layers).time == LAYERS_TOKENS / 512
    assert PassChoice(8192, "none", layers, bits=16).time == 4 * LAYERS_TOKENS / 8192
    assert PassChoice(512, "none", ("embeddings",)).time == PassChoice(512).time
    assert PassChoice(512, "none", ("head",)).time > PassChoice(512).time
