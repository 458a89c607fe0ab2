"""A handful of the kills of `benchmarks/random_kills.py`, one in each phase of a run, and the record that it goes on
with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "random_kills.py")]

GROUP = "8-bit optimizer"  # with evaluations before, during and after
PLANNED = {
    "SIGTERM@preparing:0.5": 143,
    "SIGHUP@loading:0.5": 129,
    "SIGUSR1@loading:0.3": 0,
    "SIGINT@evaluating:0.1": 130,  # before the first step
    "SIGTERM@evaluating:0.97": 75,  # after the last one
    "SIGTERM@writing the adapter:0.5": 75,
    "SIGTERM@reporting:0.5": 0,
    "SIGKILL@reporting:0.3": 137,
}
"""Kill -> the exit status that it has."""


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kills")
    plans = [word for kill in PLANNED for word in ("--plan", GROUP, kill)]
    command = [*COMMAND, "--out", str(folder / "out.jsonl"), "--work", str(folder / "work"), *plans]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (folder / "out.jsonl").exists(), done.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert done.returncode == 0, lines
    return {line["plan"]: line for line in lines}


@pytest.mark.fault("S19", "S21", "S22")
@pytest.mark.parametrize("kill", PLANNED)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_bits_of_one_that_was_not(
    kill: str, carried_out: dict[str, dict[str, Any]]
) -> None:
    line = carried_out[kill]
    assert line["verdict"] == "equal", line
    assert [sent["status"] for sent in line["kills"]] == [PLANNED[kill]]


RECORDED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from random_kills import Record, summed_up
head = {"backend": "cpu_torch", "seed": int(sys.argv[3])}
record = Record(Path(sys.argv[2]), head)
record.append({"case": len(record.cases()), "group": "plain", "verdict": sys.argv[4], "kills": [{"signal": "SIGKILL"}]})
print(record.kills())
sys.exit(summed_up(record))
"""


def recorded(file: Path, seed: int, verdict: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(ROOT / "benchmarks"), str(file), str(seed), verdict]
    return subprocess.run(
        [sys.executable, "-c", RECORDED, *arguments], capture_output=True, text=True, env=dict(os.environ), check=False
    )


def test_the_record_goes_on_after_a_line_that_was_cut_and_is_never_mixed_with_another(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    assert recorded(file, 0, "equal").stdout.startswith("1\n")
    with file.open("a") as stream:
        stream.write('{"case": 1, "gro')  # killed while it wrote
    assert recorded(file, 0, "equal").stdout.startswith("2\n")
    refused = recorded(file, 1, "equal")
    assert refused.returncode == 1
    assert "name another file" in refused.stderr
    assert recorded(file, 0, "lost").returncode == 1
