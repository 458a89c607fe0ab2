"""Whether the backend can run, and on what, told from replayed machines and their packages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.detect.hardware import inventory
from qlora_hal_backends.gptq_int4.engines import ENGINES, GPTQMODEL
from qlora_hal_backends.gptq_int4.platforms import CPU, CUDA, ROCM
from qlora_hal_backends.probing_gptq import probe_gptq
from tests.hardware.replay import NAMES, ReplayedFacts, ReplayedPackages, load

WITH_ENGINE = {"gptqmodel": "7.6.0"}


def probed(name: str, **versions: str | None) -> ProbeReport:
    """A machine's own packages with others laid over them; None removes one."""
    recording = load(name)
    packages = {**recording["packages"]["versions"], **versions}
    recording["packages"]["versions"] = {k: v for k, v in packages.items() if v is not None}
    return probe_gptq(packages=ReplayedPackages(recording), machine=inventory(ReplayedFacts(recording)))


@pytest.mark.parametrize(
    ("name", "accelerated", "word", "kind", "dtype"),
    [
        ("nvidia_h200", True, "H200", "cuda", "bfloat16"),
        ("amd_mi300x", True, "MI300X", "rocm", "bfloat16"),
        ("nvidia_t4", True, "T4", "cuda", "float16"),
        ("plain_cpu", False, "cores", "cpu", "float32"),
        ("apple_m3_macos15", False, "cores", "cpu", "float32"),
    ],
)
def test_it_runs_on_the_gpu_that_torch_drives_else_on_the_cpu(
    name: str, accelerated: bool, word: str, kind: str, dtype: str
) -> None:
    report = probed(name, **WITH_ENGINE)
    assert report.availability is Availability.READY, report.reason
    assert report.uses_accelerator is accelerated
    assert (report.device_kind, report.compute_dtype) == (kind, dtype)
    assert word in report.reason
    assert "gptqmodel 7.6.0" in report.reason
    assert report.devices
    assert report.versions["gptqmodel"] == "7.6.0"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nvidia_with_cpu_torch", "has no GPU code for"),
        ("nvidia_driver_too_old", "The NVIDIA driver is too old"),
        ("amd_with_cuda_torch", "No NVIDIA GPU was found"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_while_the_cpu_can(name: str, why: str) -> None:
    report = probed(name, **WITH_ENGINE)
    assert report.ready
    assert report.uses_accelerator is False
    assert "On the CPU, because" in report.reason
    assert why in report.reason


def test_bitsandbytes_without_a_gpu_library_does_not_stand_in_the_way() -> None:
    assert probed("nvidia_without_bitsandbytes_library", **WITH_ENGINE).uses_accelerator is True


@pytest.mark.parametrize("name", NAMES)
def test_without_an_engine_every_machine_gets_one_line_that_helps(name: str) -> None:
    report = probed(name)
    assert not report.ready
    assert report.fix
    assert report.reason.endswith(".")


def test_the_reason_names_each_engine() -> None:
    report = probed("nvidia_h200")
    assert report.availability is Availability.MISSING_PACKAGE
    assert "gptqmodel is not installed" in report.reason
    assert "auto-gptq is not installed" in report.reason
    assert report.fix == GPTQMODEL.install


def test_an_engine_beside_the_wrong_transformers_is_a_wrong_build() -> None:
    report = probed("nvidia_h200", **{"auto-gptq": "0.7.1"})
    assert report.availability is Availability.WRONG_BUILD
    assert "auto_gptq needs transformers" in report.reason


def test_the_extra_installs_what_the_engine_requires() -> None:
    root = Path(__file__).resolve().parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lowest, _ = GPTQMODEL.requires["gptqmodel"]
    assert any(line.startswith(f"gptqmodel>={lowest}") for line in extras["gptq"])


def test_each_platform_has_a_kernel_in_its_engine() -> None:
    for platform in (CUDA, ROCM, CPU):
        assert any(platform.device in kernel.devices for kernel in GPTQMODEL.kernels)
    assert all(engine.kernels for engine in ENGINES.values())
