"""Several trainings in threads of one process: what libraries change for the whole process is as it was afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, merged

_PROGRAM = """
import json, sys, threading
from qlora_hal import train

outcomes, together = {}, threading.Barrier(3)

def one(number, settings):
    together.wait()
    try:
        outcomes[number] = train(settings, quiet=True).steps
    except Exception as error:
        outcomes[number] = repr(error)

stdout = sys.stdout
runs = [threading.Thread(target=one, args=given) for given in enumerate(json.loads(sys.argv[1]))]
for run in runs: run.start()
for run in runs: run.join()

import torch
changed = [name for name, is_as_before in {
    "sys.stdout": sys.stdout is stdout,
    "torch's default dtype": torch.get_default_dtype() == torch.float32,
    "where modules are made": torch.nn.Linear(2, 2).weight.device.type == "cpu",
}.items() if not is_as_before]
print(json.dumps([[outcomes[number] for number in range(3)], changed]), file=sys.__stdout__)
"""


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_three_trainings_in_threads_of_a_new_process(tmp_path: Path) -> None:
    runs = [tmp_path / str(number) for number in range(3)]
    dtypes = ("float32", "bfloat16", "float32")
    settings = [
        merged(SMALL, {"output_dir": str(run), "training.max_steps": 2, "quantization.compute_dtype": dtype})
        for run, dtype in zip(runs, dtypes, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(settings)], capture_output=True, text=True, timeout=300, check=True
    )
    outcomes, changed = json.loads(done.stdout.splitlines()[-1])
    assert outcomes == [2, 2, 2]
    assert changed == []
    assert _losses(runs[0]) == _losses(runs[2]) != _losses(runs[1])
