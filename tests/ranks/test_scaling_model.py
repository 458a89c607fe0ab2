"""The model of many devices is the formula that it names, and never says more than that."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from scaling_model import Rates, main, ring_seconds, row, table

RATES = Rates(
    compute_seconds=0.5,
    tokens=8192,
    gradient_bytes=160_000_000,
    link_in=100e9,
    link_out=10e9,
    latency_in=5e-6,
    latency_out=20e-6,
    vote_seconds=2e-4,
    devices_per_host=8,
)


def test_one_device_is_what_was_measured() -> None:
    one = row(RATES, 1)
    assert (one.seconds, one.efficiency) == (0.5, 1.0)
    assert one.tokens_per_second == 8192 / 0.5


def test_a_ring_passes_all_but_one_share_twice_and_the_slowest_link_decides() -> None:
    assert ring_seconds(RATES, 2, 1e9, rounds=2) == pytest.approx(2 * (0.5 * 1e9 / 100e9 + 5e-6))
    assert ring_seconds(RATES, 16, 1e9, rounds=2) == pytest.approx(2 * (15 / 16 * 1e9 / 10e9 + 7 * 5e-6 + 20e-6))


def test_a_step_of_two_is_computing_reducing_and_one_vote() -> None:
    assert row(RATES, 2).seconds == pytest.approx(0.5 + ring_seconds(RATES, 2, 160_000_000, rounds=2) + 2e-4)


def test_gathers_that_hide_behind_computing_cost_nothing() -> None:
    sharded = replace(RATES, packed_bytes=5_000_000_000, layers=32, overlap=1.0)
    assert row(sharded, 4, shard=True).seconds == row(RATES, 4).seconds
    slow = replace(sharded, overlap=0.0)
    assert row(slow, 4, shard=True).seconds == pytest.approx(
        row(RATES, 4).seconds + 2 * ring_seconds(RATES, 4, 5_000_000_000, rounds=1, messages=32)
    )


def test_a_fixed_batch_has_no_more_devices_than_micro_batches() -> None:
    rows = table(replace(RATES, micro_batches=8), strong=True)
    assert [each.devices for each in rows] == [1, 2, 4, 8]
    assert [each.efficiency for each in rows] == sorted((each.efficiency for each in rows), reverse=True)


def test_the_command_says_that_it_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--compute-seconds", "0.5", "--tokens", "8192", "--gradient-bytes", "160000000"]
    assert main([*words, "--link-in", "100", "--link-out", "10", "--vote", "200"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["is"] == "a model, not a measurement"
    assert [each["devices"] for each in told["rows"]] == [1, 2, 4, 8, 16, 32, 64]
    assert told["rows"][3]["seconds"] == pytest.approx(row(RATES, 8).seconds)
