"""Whose memory a plan counts with on the machines that are replayed here, and what their cards compute in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_hal import train
from qlora_hal.cli.estimate import Wanted, estimate_as_json, estimate_as_text, estimate_run
from qlora_hal.config.resolve import nest, resolve_settings
from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.demo import model_path
from qlora_hal.detect import device_memory as device_memory_module
from qlora_hal.detect.device_memory import device_memory, refuse_absent_dtype
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.detect.hardware import inventory
from qlora_hal.errors import QloraHalError, UnsupportedFeatureError
from qlora_hal.memory.gpus import apple_working_set
from qlora_hal.run import planned_memory, prepare
from tests.hardware.replay import ReplayedFacts, load
from tests.memory.configs import write_config


@pytest.mark.parametrize(
    ("recorded", "backend"),
    [("nvidia_h200", "cuda_bnb"), ("nvidia_t4", "cuda_bnb"), ("amd_mi300x", "rocm_bnb"), ("plain_cpu", "cpu_torch")],
)
def test_a_backend_counts_with_its_own_card_or_with_the_machine(recorded: str, backend: str) -> None:
    machine = inventory(ReplayedFacts(load(recorded)))
    spec = load_spec(find(backend, listed()))
    report = ProbeReport(backend, Availability.READY, "ready")
    expected = machine.gpus[0].memory_total_bytes if machine.gpus else machine.memory_limit_bytes
    assert device_memory(spec, report, machine) == expected
    cpu = load_spec(find("cpu_torch", listed()))
    of_the_host = device_memory(cpu, ProbeReport("cpu_torch", Availability.READY, "ready"), machine)
    assert of_the_host == (machine.memory_limit_bytes or machine.memory_bytes)


def test_a_mac_counts_with_what_metal_recommends() -> None:
    machine = inventory(ReplayedFacts(load("apple_m3_macos15")))
    spec = load_spec(find("mlx_lora", listed()))
    report = ProbeReport("mlx_lora", Availability.READY, "ready", uses_accelerator=True)
    assert device_memory(spec, report, machine) == apple_working_set(machine.memory_bytes)


@pytest.mark.parametrize(("kind", "vendor"), [("cuda", "nvidia"), ("rocm", "amd"), ("", "amd")], ids=str)
def test_of_cards_of_two_vendors_those_count_that_the_backends_library_opens(kind: str, vendor: str) -> None:
    """An integrated or a larger card of the other one is nothing to it; where it does not tell, the largest is."""
    t4, mi300x = (inventory(ReplayedFacts(load(recorded))) for recorded in ("nvidia_t4", "amd_mi300x"))
    machine = replace(t4, gpus=(*t4.gpus, *mi300x.gpus))
    spec = load_spec(find("gptq_int4", listed()))
    report = ProbeReport(spec.name, Availability.READY, "ready", uses_accelerator=True, device_kind=kind)
    expected = {"nvidia": t4, "amd": mi300x}[vendor].gpus[0].memory_total_bytes
    assert device_memory(spec, report, machine) == expected


@pytest.mark.parametrize(
    ("recorded", "backend", "dtype", "code", "words"),
    [
        ("nvidia_t4", "cuda_bnb", "fp8", "QH-B01", "Tesla T4 is of compute capability 7.5, and E4M3 came with 8.9"),
        ("nvidia_t4", "cuda_bnb", "bfloat16", "QH-N10", "compute capability 7.5, and bfloat16 came with 8.0"),
        ("nvidia_v100", "cuda_bnb", "bfloat16", "QH-N10", "compute capability 7.0, and bfloat16 came with 8.0"),
        ("amd_gfx1010", "rocm_bnb", "bfloat16", "QH-N10", "gfx1010, and bfloat16 came with CDNA and RDNA 3"),
    ],
)
@pytest.mark.fault("N10")
def test_a_dtype_that_no_card_here_computes_in_is_refused_before_anything_is_loaded(
    recorded: str, backend: str, dtype: str, code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = inventory(ReplayedFacts(load(recorded)))
    monkeypatch.setattr(device_memory_module, "inventory", lambda: machine)
    spec = load_spec(find(backend, listed()))
    report = ProbeReport(backend, Availability.READY, "ready")
    with pytest.raises(QloraHalError, match=words) as refused:
        refuse_absent_dtype(dtype, spec, report)
    assert (refused.value.code, refused.value.where) == (code, "quantization.compute_dtype")
    for other in ("auto", "float16", "float32"):
        refuse_absent_dtype(other, spec, report)


def test_one_card_that_has_the_dtype_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is opened is the library's to say, and the backend asks that one again."""
    recording = load("nvidia_h200")
    recording["nvml"]["devices"].append(load("nvidia_t4")["nvml"]["devices"][0])
    machine = inventory(ReplayedFacts(recording))
    monkeypatch.setattr(device_memory_module, "inventory", lambda: machine)
    refuse_absent_dtype(
        "fp8", load_spec(find("cuda_bnb", listed())), ProbeReport("cuda_bnb", Availability.READY, "ready")
    )


@pytest.mark.slow
def test_a_run_is_refused_before_its_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose only card is a T4."""
    machine = inventory(ReplayedFacts(load("nvidia_t4")))
    monkeypatch.setattr(device_memory_module, "inventory", lambda: machine)
    ready = ProbeReport("cuda_bnb", Availability.READY, "ready", uses_accelerator=True, device_kind="cuda")
    monkeypatch.setattr(prepare, "reports", lambda entries: (ready,))
    settings = {
        "model.name_or_path": str(model_path()),
        "data.path": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "backend.name": "cuda_bnb",
        "quantization.compute_dtype": "fp8",
    }
    (tmp_path / "rows.jsonl").write_text("no row\n")
    with pytest.raises(UnsupportedFeatureError, match=r"E4M3 came with 8\.9"):
        train(nest(settings), dry_run=True)


def test_an_estimate_of_a_card_that_is_here_counts_with_its_memory_and_its_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run will: of a T4 the 15 GiB, float16, and what the host has left."""
    machine = inventory(ReplayedFacts(load("nvidia_t4")))
    ready = ProbeReport(
        "cuda_bnb", Availability.READY, "ready", uses_accelerator=True, device_kind="cuda", compute_dtype="float16"
    )
    monkeypatch.setattr(device_memory_module, "inventory", lambda: machine)
    monkeypatch.setattr(device_memory_module, "memory_available_here", lambda: 5 * 2**30)
    monkeypatch.setattr(planned_memory, "reports", lambda entries: (ready,))
    write_config(tmp_path, hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256)
    settings = {"model": str(tmp_path), "backend": "cuda_bnb", "training.recompute": "auto"}
    found = estimate_run(resolve_settings(None, keywords=settings, environ={}).config, None, Wanted(fit=True))
    told = estimate_as_json(found)
    total = machine.gpus[0].memory_total_bytes
    assert (told["gpu"], told["compute_dtype"]) == ({"memory_bytes": total, "class": "fits"}, "float16")
    assert told["host"] == {"bytes": 0, "disk_bytes": 0, "left_here": 4 * 2**30}
    assert found.planned.placement().why.endswith("within 15 GiB")
    assert found.fits_of
    assert all(one.high <= (total or 0) and one.host <= 4 * 2**30 for one in found.fits_of)
    assert "the Tesla T4 of this machine (15 GiB)" in " ".join(estimate_as_text(found, found.planned.config).split())
