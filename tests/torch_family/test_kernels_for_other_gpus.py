"""Every kernel is compiled for GPUs that are not here: Triton's compilers need none. What they compute there only a run
on them shows; the interpreter, and the GPUs of the records (`docs/runs`), show it here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_triton, pytest.mark.slow]

CHILD = Path(__file__).resolve().parent.parent / "kernels_for_other_gpus.py"
TARGETS = {
    "cuda:80:32": "A100",
    "cuda:86:32": "RTX 3090",
    "cuda:89:32": "L40S, RTX 4090",
    "cuda:90:32": "H100, H200",
    "cuda:100:32": "B200",
    "hip:gfx90a:64": "MI210, MI250X",
    "hip:gfx942:64": "MI300X",
    "hip:gfx1100:32": "RX 7900 XTX",
    "hip:gfx1201:32": "RX 9070, R9700",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, str]]:
    """In a child: this process may have Triton's interpreter in place of its compiler."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    child = subprocess.run(
        [sys.executable, str(CHILD), *TARGETS], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    result: Mapping[str, Mapping[str, str]] = json.loads(child.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("target", TARGETS, ids=TARGETS.values())
def test_every_kernel_becomes_a_binary(target: str, made: Mapping[str, Mapping[str, str]]) -> None:
    kind = "cubin" if target.startswith("cuda") else "hsaco"
    assert len(made[target]) > 1
    assert {made_of for name, made_of in made[target].items() if not name.startswith("fp8")} == {kind}


@pytest.mark.parametrize("target", ["cuda:89:32", "cuda:90:32", "cuda:100:32"])
def test_kernels_of_8_bit_floats_become_binaries_where_tensor_cores_have_them(
    target: str, made: Mapping[str, Mapping[str, str]]
) -> None:
    found = {name: kind for name, kind in made[target].items() if name.startswith("fp8")}
    assert found.keys() == {"fp8 row_scales", "fp8 decode", "fp8 quantize_rows", "fp8 product"}
    assert set(found.values()) == {"cubin"}


@pytest.mark.parametrize("target", ["cuda:80:32", "cuda:86:32"])
def test_older_gpus_have_no_8_bit_floats(target: str, made: Mapping[str, Mapping[str, str]]) -> None:
    assert "fp8e4nv not supported in this architecture" in made[target]["fp8"]
