"""A base of which each rank holds a part: the same bits as with a whole one whatever share of a window a rank has, and
a rank that runs out of memory, or is gone, in the midst of the layers leaves no other one waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
PATIENCE = 240.0


def two_ranks(trial: str, options: Sequence[Mapping[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """What each of two ranks found, a piece for each of `options`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                str(TESTS / "one_torch_rank.py"),
                trial,
                json.dumps(options),
                str(folder / f"{rank}.json"),
            ],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            rank.wait(PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    files = [folder / f"{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) if file.is_file() else [] for file in files]


@pytest.mark.slow
def test_a_base_in_parts_gives_the_bits_of_a_whole_one_where_ranks_have_unequal_shares(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"weight_format": "none", "checkpointing": True},
        {"weight_format": "int8", "dtype": "bfloat16"},
        {"weight_format": "fp4", "optimizer": "adamw_8bit"},
        {"dtype": "bfloat16", "targets": ["5.mlp.down_proj"]},
        {"checkpointing": True, "recompute": "offload", "base_offload": ["embeddings", "head"]},
    ]
    for rank in two_ranks("alike", asked, tmp_path):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert "error" not in found, (options, found)
            assert found["shard"] == found["data"], options


@pytest.mark.slow
def test_a_rank_short_of_memory_within_the_layers_keeps_the_others_company_and_the_step_is_taken_again(
    tmp_path: Path,
) -> None:
    asked: list[dict[str, Any]] = [
        {"at": 1},
        {"at": 15},
        {"at": 160},
        {"at": 70, "checkpointing": True},
        {"at": 30, "targets": ["3.mlp.down_proj"]},
    ]
    for rank in two_ranks("short_of_memory", asked, tmp_path):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert found.get("said") == "QH-N07", (options, found)
            assert found["again"] == found["undisturbed"], options


@pytest.mark.slow
@pytest.mark.fault("R02")
def test_a_rank_that_is_gone_while_its_part_is_waited_for_is_told_as_one(tmp_path: Path) -> None:
    [[found], other] = two_ranks("gone", [{}], tmp_path)
    assert other == []
    assert found["error"] == "QH-R02", found
