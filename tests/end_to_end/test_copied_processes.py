"""A process that is copied by fork after it has computed: torch, MLX and tokenizers hang there, and are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, merged

_PROGRAM = """
import json, multiprocessing, signal, sys
import qlora_hal
from qlora_hal.errors import BackendError

method, backend, first, second = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])

def again():
    signal.alarm(120)
    try:
        qlora_hal.train(second, quiet=True)
        qlora_hal.load(second["output_dir"], backend=backend, quiet=True).close()
    except BackendError as refusal:
        print(refusal.code, flush=True)
    else:
        print("trained", flush=True)

if __name__ == "__main__":
    qlora_hal.train(first, quiet=True)
    child = multiprocessing.get_context(method).Process(target=again)
    child.start()
    child.join()
    print(json.dumps(child.exitcode))
"""


@pytest.mark.slow
@pytest.mark.fault("E67")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(
    ("method", "backend", "outcome"),
    [("fork", "cpu_torch", "QH-E67"), ("fork", "mlx_lora", "QH-E67"), ("spawn", "cpu_torch", "trained")],
)
def test_a_copy_of_a_process_that_trained_refuses_to_train_and_a_new_one_trains(
    tmp_path: Path, method: str, backend: str, outcome: str
) -> None:
    runs = [
        merged(SMALL, {"output_dir": str(tmp_path / name), "training.max_steps": 1, "backend.name": backend})
        for name in ("first", "second")
    ]
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, str(program), method, backend, *map(json.dumps, runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.split() == [outcome, "0"]
