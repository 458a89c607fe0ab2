"""Beside transformers 5, auto-gptq is never imported; what its engine refuses, it refuses before it would need it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_hal.errors import BackendUnavailableError, ModelError, UnsupportedFeatureError
from qlora_hal.errors.installation import requirement
from qlora_hal_backends.gptq_int4.auto_gptq_engine import load_weight
from qlora_hal_backends.gptq_int4.auto_gptq_solver import quantize
from qlora_hal_backends.gptq_int4.engines import (
    GptqSettings,
    PackedLinear,
    QuantizationJob,
    installed_engine,
)
from qlora_hal_oracle import (
    GptqGrid,
    GptqWeight,
    ZeroPointConvention,
    gptq_codes,
    pack_gptq,
)

IN_ORDER = GptqSettings(32, True, False, "gptq")
ACT_ORDER_V2 = GptqSettings(32, False, True, "gptq_v2")

ROOT = Path(__file__).resolve().parents[2]


def packed_linear(
    inputs: int = 64, outputs: int = 32, zeros: int = 8, convention: ZeroPointConvention = ZeroPointConvention.V1
) -> PackedLinear:
    groups = (np.arange(inputs) // 32).astype(np.int32)
    sides = (int(groups.max()) + 1, outputs)
    grid = GptqGrid(np.full(sides, 0.25, np.float32), np.full(sides, zeros, np.int64))
    codes = np.random.default_rng(0).integers(0, 16, (inputs, outputs))
    stored = pack_gptq(codes, grid, groups, bits=4, convention=convention)
    parts = (stored.qweight, stored.qzeros, stored.scales, stored.g_idx)
    return PackedLinear("layer", *(torch.from_numpy(part.copy()) for part in parts))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A search path on which auto-gptq 0.7.1 is installed, and leaves a mark when it is imported."""
    folder = tmp_path / "packages"
    (folder / "auto_gptq").mkdir(parents=True)
    code = (
        "from pathlib import Path\nPath(__file__).with_name('imported').touch()\nraise ImportError('no_init_weights')\n"
    )
    (folder / "auto_gptq" / "__init__.py").write_text(code)
    (folder / "auto_gptq-0.7.1.dist-info").mkdir()
    (folder / "auto_gptq-0.7.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: auto-gptq\nVersion: 0.7.1\n"
    )
    return folder


def was_imported(trap: Path) -> bool:
    return (trap / "auto_gptq" / "imported").exists()


def test_trap_catches_an_import(trap: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", "import auto_gptq"], env={**os.environ, "PYTHONPATH": str(trap)}, check=False
    )
    assert child.returncode != 0
    assert was_imported(trap)


def test_doctor_says_who_needs_auto_gptq_and_how_it_is_installed() -> None:
    from qlora_hal.cli.doctor import as_text
    from qlora_hal.detect.hardware import inventory
    from qlora_hal_backends.gptq_int4 import probe

    text = as_text(inventory(), [probe()], [])
    assert "Only quantizing or training with auto-gptq 0.7.1 itself" in text
    assert f".venv-auto-gptq/bin/pip install {requirement('auto-gptq', 'conformance')}" in text


def test_environment_of_the_script_is_what_the_extra_asks_for() -> None:
    """Every pin of ci/auto_gptq_constraints.txt lies in the range that pyproject.toml gives for it."""
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "ci" / "auto_gptq_constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["auto-gptq"]]
    wanted = [r for r in map(Requirement, asked) if r.marker is None or r.marker.evaluate({"python_version": "3.11"})]
    outside = [r for r in wanted if r.name in pins and not r.specifier.contains(pins[r.name])]
    assert not outside, f"{[(str(r), pins[r.name]) for r in outside]}"
    assert {"auto-gptq", "transformers", "numpy", "tokenizers"} <= {r.name for r in wanted if r.name in pins}


def test_detection_leaves_auto_gptq_alone(trap: Path) -> None:
    code = (
        "import qlora_hal\n"
        "report, = [r for r in qlora_hal.backends() if r.backend == 'gptq_int4']\n"
        "assert report.ready and 'gptqmodel' in report.reason, report\n"
        "from qlora_hal_backends.gptq_int4.engines import installed_engine\n"
        "assert installed_engine().name == 'gptqmodel'\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(trap)}, check=True)
    assert not was_imported(trap)


@pytest.mark.fault("E61")
def test_layer_for_auto_gptq_is_refused_without_an_attempt(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(trap))
    with pytest.raises(BackendUnavailableError, match="transformers") as caught:
        load_weight(packed_linear(), IN_ORDER, "cuda_old", torch.float32)
    assert caught.value.code == "QH-E61"
    assert f"pip install {requirement('auto-gptq', 'conformance')}" in caught.value.fix
    assert not was_imported(trap)


@pytest.mark.fault("E60")
def test_engine_asked_for_by_name_is_refused_with_what_it_needs(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(trap))
    with pytest.raises(UnsupportedFeatureError, match="transformers") as caught:
        installed_engine("auto_gptq")
    assert caught.value.code == "QH-E60"
    assert not was_imported(trap)


@pytest.mark.fault("M55")
@pytest.mark.parametrize(("inputs", "outputs", "named"), [(64, 20, "20 outputs"), (72, 32, "72 inputs")])
def test_sides_that_auto_gptq_cuts_off_are_refused(inputs: int, outputs: int, named: str) -> None:
    """Its buffers have `out // 32 * 4` words, its groups are reshaped: what is over is dropped or breaks later."""
    words = -(-outputs // 8)
    sides = (-(-inputs // 32), outputs)
    packed = PackedLinear(
        "layer",
        torch.zeros((inputs // 8, outputs), dtype=torch.int32),
        torch.zeros((sides[0], words), dtype=torch.int32),
        torch.ones(sides, dtype=torch.float16),
        torch.arange(inputs, dtype=torch.int32) // 32,
    )
    with pytest.raises(ModelError, match=named) as caught:
        load_weight(packed, IN_ORDER, "cuda_old", torch.float32)
    assert caught.value.code == "QH-M55"
    assert caught.value.exit_status == 5


@pytest.mark.fault("C74")
def test_zero_point_that_the_act_order_kernel_reads_as_sixteen_is_refused() -> None:
    packed = packed_linear(zeros=0, convention=ZeroPointConvention.V2)
    with pytest.raises(ModelError, match="zero point of 0") as caught:
        load_weight(packed, ACT_ORDER_V2, "cuda", torch.float32)
    assert caught.value.code == "QH-C74"


@pytest.mark.parametrize("zeros", range(16))
def test_zero_points_of_format_v2_are_stored_less_one_for_auto_gptq(zeros: int) -> None:
    from qlora_hal_backends.gptq_int4.auto_gptq_engine import _stored_less_one

    two = packed_linear(zeros=zeros, convention=ZeroPointConvention.V2)
    less_one = _stored_less_one(two.qzeros, ACT_ORDER_V2)
    parts = (two.qweight.numpy(), less_one.numpy(), two.scales.numpy(), two.g_idx.numpy())
    _, found = gptq_codes(GptqWeight(*parts, bits=4, convention=ZeroPointConvention.V1))
    assert (found == zeros).all()


def test_format_that_auto_gptq_cannot_write_is_refused(tmp_path: Path) -> None:
    job = QuantizationJob(tmp_path, tmp_path, [[1, 2, 3]], GptqSettings(32, False, False, "gptq_v2"))
    with pytest.raises(UnsupportedFeatureError, match="v1 only") as caught:
        quantize(job, lambda *_: None)
    assert caught.value.code == "QH-B01"
