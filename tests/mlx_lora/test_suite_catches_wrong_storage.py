"""The conformance suite tells MLX weights that are stored wrongly from right ones, in every format that MLX brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

TESTS = Path(__file__).resolve().parents[1]
AFFINE = {"int2_affine", "int3_affine", "int4_affine", "int5_affine", "int6_affine", "int8_affine"}
MICROSCALING = {"mxfp4", "nvfp4", "mxfp8"}


def failed_cases(trainer: str, folder: Path, cases: str) -> set[str]:
    command = [sys.executable, "-m", "qlora_hal_conformance", "--spec", "qlora_hal_backends.mlx_lora:SPEC"]
    command += ["--trainer", trainer, "--section", "20", "-k", cases, "--seed", "7", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    results = json.loads((folder / "results.json").read_text())["cases"]
    assert results
    return {case["case"].partition("[")[2].rstrip("]") for case in results if case["verdict"] == "failed"}


@pytest.mark.parametrize(
    ("storage", "cases", "caught"),
    [
        ("biases_dropped", "every_weight_is_within", AFFINE),
        ("scales_doubled", "every_weight_is_within", MICROSCALING),
        ("absmax_of_a_neighbour", "every_weight_is_within", {"nf4"}),
        ("group_size_ignored", "blocks_have_the_size and int4_affine", {"int4_affine-32", "int4_affine-128"}),
    ],
)
def test_wrong_storage_fails_where_it_matters(storage: str, cases: str, caught: set[str], tmp_path: Path) -> None:
    assert failed_cases(f"mlx_lora.wrong_storage:{storage}", tmp_path, cases) == caught
