"""The conformance suite tells a reader of the wrong convention from a right one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

TESTS = Path(__file__).resolve().parents[1]
CASE = "20_quantization/gptq_checkpoint_is_read_in_its_own_convention"


def failed_cases(trainer: str, folder: Path) -> set[str]:
    command = [sys.executable, "-m", "qlora_hal_conformance", "--spec", "qlora_hal_backends.gptq_int4:SPEC"]
    command += ["--trainer", trainer, "--section", "20", "-k", "own_convention", "--seed", "7", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert any(line.startswith("20_quantization ") for line in lines), done.stdout + done.stderr
    return {line.split()[1].removeprefix(CASE) for line in lines if line.startswith("failed ")}


def test_the_honest_reader_passes(tmp_path: Path) -> None:
    assert failed_cases("qlora_hal_backends.gptq_int4.trainer:open_trainer", tmp_path) == set()


@pytest.mark.parametrize(
    ("reader", "caught"),
    [
        ("reads_v2_as_v1", {"[v2]", "[v2-asymmetric]", "[v2-asymmetric-act_order]"}),
        ("reads_v1_as_v2", {"[v1-act_order]"}),
        ("takes_groups_in_order", {"[v1-act_order]", "[v2-asymmetric-act_order]"}),
        ("takes_the_middle_for_every_zero", {"[v2-asymmetric]", "[v2-asymmetric-act_order]", "[v1-act_order]"}),
    ],
)
def test_a_wrong_reader_fails_where_its_convention_matters(reader: str, caught: set[str], tmp_path: Path) -> None:
    assert failed_cases(f"gptq_int4.wrong_readers:{reader}", tmp_path) == caught
