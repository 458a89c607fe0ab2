"""Every probe on every replayed machine gives the expected answer with its reason and one fix.

The machines are constructed from documented formats, not recorded on that hardware.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.detect.hardware import inventory
from qlora_hal.errors.installation import install_line, pip
from qlora_hal_backends.probing import probe_here, probe_mlx, probe_torch
from qlora_hal_backends.probing_limits import Device, bf16_supported, likely_dtype
from qlora_hal_backends.probing_mlx import MLX_FAMILY
from qlora_hal_backends.probing_packages import (
    InstalledPackages,
    TorchBuild,
    matching_library,
    native_versions,
    torch_build,
)
from qlora_hal_backends.probing_torch import TOO_NEW, TORCH_FAMILY
from tests.hardware.replay import NAMES, ReplayedFacts, ReplayedPackages, load

DEVICES: tuple[Device, ...] = ("cuda", "rocm", "mps", "cpu")


def probed(recording: dict[str, Any], device: str) -> ProbeReport:
    machine, packages = inventory(ReplayedFacts(recording)), ReplayedPackages(recording)
    if device == "mlx":
        return probe_mlx("mlx_lora", packages=packages, machine=machine)
    return probe_torch(f"torch_{device}", device=device, packages=packages, machine=machine)  # type: ignore[arg-type]


@pytest.mark.fault("E01")
@pytest.mark.fault("E02")
@pytest.mark.fault("E03")
@pytest.mark.fault("E04")
@pytest.mark.fault("E05")
@pytest.mark.fault("E06")
@pytest.mark.parametrize("device", [*DEVICES, "mlx"])
@pytest.mark.parametrize("name", NAMES)
def test_probe_on_a_replayed_machine(name: str, device: str) -> None:
    recording = load(name)
    report = probed(recording, device)
    availability, *words = recording["expect"][device]
    said = f"{report.reason} {report.fix}"
    assert (report.availability.value, [word for word in words if word not in said]) == (availability, []), said
    assert report.reason.endswith(".")
    if report.ready:
        assert report.devices
        assert report.fix == ""
        assert report.versions
    else:
        assert report.devices == ()
        assert report.fix
    json_form = report.as_json()
    assert json_form["availability"] == availability


@pytest.mark.fault("N10")
@pytest.mark.parametrize("name", NAMES)
def test_bf16_follows_the_hardware(name: str) -> None:
    recording = load(name)
    supported, reason = bf16_supported(inventory(ReplayedFacts(recording)))
    expected, *words = recording["bf16"]
    assert supported is expected
    assert [word for word in words if word not in reason] == []


@pytest.mark.fault("N10")
def test_bf16_of_several_cards_is_that_of_the_weakest() -> None:
    recording = load("nvidia_h200")
    t4 = load("nvidia_t4")["nvml"]["devices"][0]
    recording["nvml"]["devices"].append(t4)
    supported, reason = bf16_supported(inventory(ReplayedFacts(recording)), "cuda")
    assert not supported
    assert "Tesla T4" in reason
    assert bf16_supported(inventory(ReplayedFacts(recording)), "cpu")[0]


def test_dtype_of_a_gpu_of_unknown_age_is_left_open() -> None:
    recording = load("nvidia_h200")
    assert likely_dtype(inventory(ReplayedFacts(recording)), "cuda") == "bfloat16"
    recording["nvml"] = None
    assert likely_dtype(inventory(ReplayedFacts(recording)), "cuda") is None


# single faults ------------------------------------------------------------------------------------------------------
@pytest.mark.fault("E01")
def test_nothing_installed_names_all_packages_and_one_line_to_install_them() -> None:
    recording = load("nvidia_h200")
    recording["packages"] = {"versions": {}, "files": {}, "texts": {}}
    report = probed(recording, "cuda")
    assert report.availability is Availability.MISSING_PACKAGE
    assert report.reason == "Not installed: torch, transformers, accelerate, bitsandbytes."
    assert report.fix == install_line("cuda")
    rocm = {**load("amd_mi300x"), "packages": recording["packages"]}
    assert "whl/rocm7.2" in probed(rocm, "rocm").fix
    assert probed(rocm, "rocm").fix.endswith(install_line("rocm"))
    old_card = {**load("nvidia_v100"), "packages": recording["packages"]}
    assert "whl/cu126" in probed(old_card, "cuda").fix


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_devices_are_told_from_missing_ones(value: str) -> None:
    nvidia = {**load("nvidia_h200"), "environment": {"CUDA_VISIBLE_DEVICES": value}}
    assert probed(nvidia, "cuda").availability is Availability.NO_DEVICE
    assert probed(nvidia, "cuda").fix == "Unset CUDA_VISIBLE_DEVICES."
    amd = {**load("amd_mi300x"), "environment": {"HIP_VISIBLE_DEVICES": value}}
    assert probed(amd, "rocm").fix == "Unset HIP_VISIBLE_DEVICES."
    shown = {**load("nvidia_h200"), "environment": {"CUDA_VISIBLE_DEVICES": "0"}}
    assert probed(shown, "cuda").ready


@pytest.mark.parametrize(
    ("name", "device", "words"), [("nvidia_h200", "cuda", "nvidia-smi"), ("amd_mi300x", "rocm", "/dev/kfd")]
)
def test_a_card_without_driver_is_told_from_no_card(name: str, device: str, words: str) -> None:
    recording = load(name)
    recording["nvml"] = None
    recording["files"] = {path: text for path, text in recording["files"].items() if "/sys/bus/pci" in path}
    report = probed(recording, device)
    assert report.availability is Availability.NO_DEVICE
    assert "GPU is on the bus" in report.reason
    assert words in report.fix


@pytest.mark.fault("E03")
def test_one_unsupported_card_among_several_is_left_out() -> None:
    recording = load("nvidia_h200")
    recording["nvml"]["devices"].append(load("nvidia_v100")["nvml"]["devices"][0])
    report = probed(recording, "cuda")
    assert report.ready
    assert report.devices == ("NVIDIA H200",)


@pytest.mark.fault("E03")
@pytest.mark.parametrize("torch", [None, "2.13.0+cpu"])
def test_nobody_is_sent_to_install_a_torch_without_code_for_the_card(torch: str | None) -> None:
    recording = load("amd_gfx1010")
    versions = {} if torch is None else {"torch": torch}
    recording["packages"] = {"versions": versions, "files": {}, "texts": {}}
    report = probed(recording, "rocm")
    assert report.availability is Availability.WRONG_BUILD
    assert "gfx1010" in report.reason
    assert "pip install" not in report.fix


@pytest.mark.fault("E03")
def test_a_torch_built_from_source_is_not_judged_by_the_public_wheels() -> None:
    recording = load("amd_gfx1010")
    recording["packages"]["versions"]["torch"] = "2.13.0a0+gitcf30153"
    assert probed(recording, "rocm").ready
    overridden = {**load("amd_gfx1010"), "environment": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}}
    assert probed(overridden, "rocm").ready


@pytest.mark.fault("E05")
def test_an_override_of_the_library_must_name_one_that_exists() -> None:
    good = {**load("nvidia_h200"), "environment": {"BNB_CUDA_VERSION": "128"}}
    assert probed(good, "cuda").ready
    bad = {**load("nvidia_h200"), "environment": {"BNB_CUDA_VERSION": "125"}}
    report = probed(bad, "cuda")
    assert report.availability is Availability.WRONG_BUILD
    assert "libbitsandbytes_cuda125" in report.reason
    assert report.fix == "Unset BNB_CUDA_VERSION."


@pytest.mark.fault("E05")
def test_the_cpu_library_is_needed_on_the_cpu() -> None:
    recording = load("plain_cpu")
    recording["packages"]["files"]["bitsandbytes"] = ["__init__.py"]
    report = probed(recording, "cpu")
    assert report.availability is Availability.WRONG_BUILD
    assert "libbitsandbytes_cpu" in report.reason


@pytest.mark.fault("E05")
@pytest.mark.parametrize(
    "versions",
    [{"bitsandbytes-rocm": "0.42.0"}, {"bitsandbytes": "0.44.1.dev0+rocm62"}],
    ids=["other name", "local tag"],
)
def test_an_old_rocm_fork_is_recognised_and_explained(versions: dict[str, str]) -> None:
    recording = load("amd_mi300x")
    recording["packages"]["versions"].update(versions)
    report = probed(recording, "rocm")
    assert report.availability is Availability.WRONG_BUILD
    assert "fork from before 0.49" in report.reason
    (fork,) = versions
    assert report.fix.startswith(pip(f"uninstall -y {fork}"))


@pytest.mark.fault("E18")
def test_versions_out_of_range_are_all_named() -> None:
    recording = load("nvidia_h200")
    recording["packages"]["versions"] |= {"torch": "2.7.1", "transformers": "6.0.0"}
    report = probed(recording, "cuda")
    assert report.availability is Availability.WRONG_BUILD
    assert "torch 2.7.1 (needs 2.8 or newer)" in report.reason
    assert "transformers 6.0.0 (needs 5.10.1 or newer, below 6)" in report.reason


@pytest.mark.parametrize(
    ("versions", "availability", "words"),
    [
        ({"mlx": "0.32.4", "mlx-lm": "0.32.2"}, "wrong_build", "without a library to compute with"),
        ({"mlx": "0.32.4", "mlx-lm": "0.32.2", "mlx-cuda-13": "0.32.4"}, "wrong_build", "no NVIDIA GPU was found"),
        ({"mlx": "0.31.0", "mlx-lm": "0.32.2", "mlx-cpu": "0.31.0"}, "wrong_build", "mlx 0.31.0 (needs 0.32 or newer)"),
        ({"mlx": "0.32.4", "mlx-cpu": "0.32.4"}, "missing_package", "mlx-lm"),
    ],
)
def test_an_incomplete_mlx_on_linux_is_explained(versions: dict[str, str], availability: str, words: str) -> None:
    recording = load("plain_cpu")
    recording["packages"]["versions"] = versions
    report = probed(recording, "mlx")
    assert report.availability.value == availability
    assert words in report.reason


@pytest.mark.fault("E02")
def test_a_driver_too_old_for_mlx_is_named() -> None:
    recording = load("nvidia_driver_too_old")
    recording["packages"]["versions"] |= {"mlx": "0.32.4", "mlx-lm": "0.32.2", "mlx-cuda-13": "0.32.4"}
    report = probed(recording, "mlx")
    assert "535.183.01 is installed, mlx-cuda-13 needs 580" in report.reason


# packages -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "text", "others", "expected"),
    [
        ("2.13.0", "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", {}, ("cuda", (13, 0))),
        ("2.6.0", "cuda = '12.4'\ngit_version = 'x'\nhip = None\n", {}, ("cuda", (12, 4))),
        (
            "2.13.0+rocm7.2",
            "cuda: Optional[str] = None\nhip: Optional[str] = '7.2.26015-fc0010cf6a'\n",
            {},
            ("rocm", (7, 2)),
        ),
        ("2.13.0", "cuda: Optional[str] = None\nhip: Optional[str] = None\n", {}, ("cpu", ())),
        ("2.13.0+xpu", "cuda = None\nhip = None\nxpu: Optional[str] = '20250302'\n", {}, ("xpu", (20250302,))),
        ("2.13.0+cu126", None, {}, ("cuda", (12, 6))),
        ("2.13.0+rocm6.4", None, {}, ("rocm", (6, 4))),
        ("2.13.0+cpu", None, {}, ("cpu", ())),
        ("2.13.0", None, {"nvidia-cuda-runtime": "13.0.96"}, ("cuda", (13, 0))),
        ("2.8.0", None, {"nvidia-cuda-runtime-cu12": "12.8.90"}, ("cuda", (12, 8))),
        ("2.13.0", None, {}, ("cpu", ())),
    ],
)
def test_torch_tells_its_build(
    version: str, text: str | None, others: dict[str, str], expected: tuple[str, Any]
) -> None:
    texts = {} if text is None else {"torch/version.py": text}
    build = torch_build(
        ReplayedPackages({"packages": {"versions": {"torch": version, **others}, "files": {}, "texts": texts}})
    )
    assert build is not None
    assert (build.kind, build.toolkit) == expected


@pytest.mark.parametrize(
    ("wanted", "library"),
    [
        ((12, 6), "126"),
        ((12, 9), "128"),
        ((12, 0), "121"),
        ((13, 1), "130"),
        ((13, 9), "132"),
        ((11, 8), "118"),
        ((14, 0), None),
    ],
)
def test_bitsandbytes_falls_back_within_a_major_version_only(wanted: tuple[int, int], library: str | None) -> None:
    available = native_versions(ReplayedPackages(load("nvidia_h200")), "cuda")
    assert matching_library(available, wanted) == (f"libbitsandbytes_cuda{library}.so" if library else None)


def test_rocm_libraries_have_one_digit_of_major_version() -> None:
    found = native_versions(ReplayedPackages(load("amd_mi300x")), "rocm")
    assert sorted(found) == [(6, 4), (7, 0), (7, 1), (7, 2), (7, 14), (7, 15)]


def test_the_real_packages_of_this_environment_are_read_without_import() -> None:
    """The installed torch says the same when it is imported, in a child, as its file says here."""
    build = torch_build(InstalledPackages())
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.version.hip)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    version, cuda, hip = done.stdout.split()
    kind = "cuda" if cuda != "None" else "rocm" if hip != "None" else "cpu"
    assert build == TorchBuild(version, kind, build.toolkit if build else ())  # type: ignore[arg-type]


def test_lowest_versions_are_those_of_the_packaging() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lines = [line for line in extras["torch-family"] + extras["mlx"] if "python_version" not in line]
    declared = dict(re.findall(r"([a-z-]+)(?:\[.*?\])?>=([\d.]+)", " ".join(lines)))
    assert declared == {**TORCH_FAMILY, **MLX_FAMILY}
    assert any(f"<{TOO_NEW['transformers']}" in line for line in extras["torch-family"])


def test_probes_import_no_tensor_library_and_take_under_fifty_milliseconds() -> None:
    code = """
import sys, time
from qlora_hal_backends.probing import probe_here, probe_mlx
def seconds(probe):
    started = time.perf_counter()
    probe()
    return time.perf_counter() - started
probes = (*[lambda d=d: probe_here("x", d) for d in ("cuda", "rocm", "mps", "cpu")], probe_mlx)
# The best of three: other processes share these cores.
slowest = max(min(seconds(probe) for _ in range(3)) for probe in probes)
heavy = {"torch", "mlx", "transformers", "bitsandbytes", "numpy", "mlx_lm", "accelerate"} & set(sys.modules)
print(slowest, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert float(seconds) < 0.05
    assert heavy.strip() == "[]"


def test_probing_this_machine_twice_gives_the_same_answer() -> None:
    assert probe_here("cpu_torch", "cpu") == probe_here("cpu_torch", "cpu")
