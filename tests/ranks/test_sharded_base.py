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
from published_mxfp4 import write_published_gpt_oss
from tiny_models import write_model

TESTS = Path(__file__).parents[1]
PATIENCE = 240.0


def each_rank(
    trial: str, options: Sequence[Mapping[str, Any]], folder: Path, ranks: int = 2
) -> list[list[dict[str, Any]]]:
    """What each of two or more ranks found, a piece for each of `options`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
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
        for rank in range(ranks)
    ]
    try:
        for process in started:
            process.wait(PATIENCE)
    finally:
        for process in started:
            process.kill()
            process.wait()
    files = [folder / f"{rank}.json" for rank in range(ranks)]
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
    for rank in each_rank("alike", asked, tmp_path):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert "error" not in found, (options, found)
            assert found["shard"] == found["data"], options


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_experts_in_parts_give_the_bits_of_whole_ones(ranks: int, tmp_path: Path) -> None:
    """Stacks that three ranks cannot divide evenly among them, experts without tokens, layers without experts."""
    many, shared, dense_first, both = (tmp_path / name for name in ("many", "shared", "dense first", "both"))
    write_model(many, "qwen3_moe", num_hidden_layers=4, num_experts=50, num_local_experts=50)
    write_published_gpt_oss(tmp_path / "mxfp4")
    asked: list[dict[str, Any]] = [
        {"model": str(many), "fused": True, "checkpointing": True, "base_offload": ["embeddings", "head"]},
        {"model": str(tmp_path / "mxfp4"), "weight_format": "mxfp4", "checkpointing": True},
    ]
    if ranks == 2:
        write_model(shared, "qwen2_moe", num_hidden_layers=3)
        write_model(dense_first, "deepseek_v3", num_hidden_layers=3)
        write_model(both, "glm4_moe", num_hidden_layers=4)
        asked += [
            {"model": str(many), "checkpointing": True, "recompute": "selective", "weight_format": "int8"},
            {"model": str(shared), "fused": True, "targets": ["self_attn", "shared_expert."], "dropout": 0.1},
            {"model": str(dense_first), "weight_format": "none", "optimizer": "adamw_8bit"},
            {"model": str(both), "fused": True, "checkpointing": True},
        ]
    asked = [{"dropout": 0.0, **options} for options in asked]
    for rank in each_rank("alike", asked, tmp_path, ranks):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert "error" not in found, (options, found)
            assert found["shard"] == found["data"], options


@pytest.mark.slow
def test_a_rank_short_of_memory_within_its_experts_keeps_the_others_company(tmp_path: Path) -> None:
    """The fused schedule asks for a layer four times for its attention and three times for its experts."""
    write_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=4)
    model = {"model": str(tmp_path / "model"), "dropout": 0.0}
    asked: list[dict[str, Any]] = [
        *({**model, "fused": True, "at": at} for at in (5, 7, 40)),
        {**model, "fused": True, "checkpointing": True, "at": 17},
        {**model, "at": 60},
    ]
    for rank in each_rank("short_of_memory", asked, tmp_path):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert found.get("said") == "QH-N07", (options, found)
            assert found["again"] == found["undisturbed"], options


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
    for rank in each_rank("short_of_memory", asked, tmp_path):
        assert len(rank) == len(asked)
        for options, found in zip(asked, rank, strict=True):
            assert found.get("said") == "QH-N07", (options, found)
            assert found["again"] == found["undisturbed"], options


@pytest.mark.slow
@pytest.mark.fault("R02")
def test_a_rank_that_is_gone_while_its_part_is_waited_for_is_told_as_one(tmp_path: Path) -> None:
    [[found], other] = each_rank("gone", [{}], tmp_path)
    assert other == []
    assert found["error"] == "QH-R02", found
